"""Sort a job's input into fixed shards, once, so that a resumed job meets the very same shards.

In: input tables. Out: part files (a run of rows per shard, one after the other) and a manifest that says where each run lies,
written last. A run is read by its bytes alone, so that a shard costs the same in a job of any size. A shard is a range of
query_key: reordered or re-cut input changes nothing, one query's rows meet in one shard, where duplicates are found, and
shards in order are keys in order. Knows nothing of prompts, models or engines.
"""

from __future__ import annotations

import bisect
import math
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from headtail.adapters.storage import Storage, open_storage, open_table, put, read_record, write_once
from headtail.adapters.storage.base import storage_errors
from headtail.batch.job import InputTable, Job
from headtail.core.config import Config
from headtail.core.errors import InputError, StorageError
from headtail.core.receipt import FileRef
from headtail.core.rows import KEY, conform, shards_of, with_side_inputs

SHARD_ROWS = 20_000  # a shard is held in a worker's memory: some 20 MB
SMALLEST_SHARD_ROWS = 250
PART_ROWS = 1_000_000  # rows that one task sorts in memory: some 200 MB
IN_PROCESS_ROWS = 2 * PART_ROWS  # fewer are sorted here; a cluster would take longer to start

# What the rest of the job needs of an input row; a task's side inputs follow.
INPUT = pa.schema([("query_key", KEY), ("query", pa.string()), ("count", pa.int64()), ("stratum", pa.string()), ("eval_only", pa.bool_())])


class PartFile(Config):
    """One part file: run i, an Arrow IPC stream, holds the rows of shard `shards[i]`."""

    file: FileRef = Field(description="the part file")
    shards: tuple[int, ...] = Field(description="shard of each run, ascending")
    ends: tuple[int, ...] = Field(description="byte at which each run ends; it begins where the one before ends")
    sums: tuple[int, ...] = Field(description="CRC-32 of each run's bytes")


class InputManifest(Config):
    """The job's input, sorted. Its presence means that every part is complete."""

    shards: int = Field(ge=1, description="how many shards the rows are spread over")
    rows: int = Field(ge=0, description="rows of all input tables, duplicates included")
    parts: tuple[PartFile, ...] = Field(description="part files, in order of input")
    missing_side_inputs: dict[str, tuple[str, ...]] = Field({}, description="side inputs that a table does not have, by the table's label")


@dataclass(frozen=True)
class Fragment:
    """A run of row groups of one table: what one task sorts into one part file."""

    table: InputTable
    groups: tuple[int, ...]
    number: int


def prepare_input(job: Job) -> InputManifest:
    """The job's manifest: the one that is there, else made now. The first to publish one wins."""
    store = open_storage(job.root)
    if not store.exists(job.manifest_path()):
        fragments, rows, missing_side_inputs = list_fragments(store, job)
        shards = job.shards or shard_count(rows, job.workers)
        parts = _sort_all(job, fragments, shards, rows)
        made = InputManifest(shards=shards, rows=rows, parts=tuple(parts), missing_side_inputs=missing_side_inputs)
        write_once(store, job.manifest_path(), made.model_dump_json(indent=1).encode())  # the first one counts
    return read_record(store, InputManifest, job.manifest_path())


def shard_count(rows: int, workers: int) -> int:
    """How many shards suit `rows`: at most SHARD_ROWS each, and four per worker as long as they do not become tiny."""
    by_size = math.ceil(rows / SHARD_ROWS)
    by_workers = min(4 * workers, rows // SMALLEST_SHARD_ROWS)
    return max(1, by_size, by_workers)


def list_fragments(store: Storage, job: Job) -> tuple[list[Fragment], int, dict[str, tuple[str, ...]]]:
    """The fragments of all tables, their rows, and which side inputs a table lacks. Reads Parquet footers only."""
    found: list[Fragment] = []
    rows, missing_side_inputs = 0, {}
    for table in job.tables:
        with open_table(store, table.path) as file:
            rows += file.metadata.num_rows
            missing = tuple(name for name in job.task.side_inputs if name not in file.schema_arrow.names)
            if missing and job.side_inputs:
                missing_side_inputs[table.label] = missing
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        found += [Fragment(table, groups, len(found) + i) for i, groups in enumerate(_cut(sizes))]
    if not rows:
        raise InputError("no rows to answer", where=", ".join(table.label for table in job.tables), fix="name input tables that hold rows")
    return found, rows, missing_side_inputs


def _cut(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    held: list[int] = []
    rows = 0
    for group, size in enumerate(sizes):
        if held and rows + size > PART_ROWS:
            yield tuple(held)
            held, rows = [], 0
        held.append(group)
        rows += size
    if rows:
        yield tuple(held)


def _sort_all(job: Job, fragments: list[Fragment], shards: int, rows: int) -> list[PartFile]:
    if rows <= IN_PROCESS_ROWS:
        return [sort_fragment(job, fragment, shards) for fragment in fragments]
    import ray

    from headtail.adapters.cluster import start_cluster, unwrap_error

    start_cluster()
    asked = ray.data.from_items([{"number": i} for i in range(len(fragments))], override_num_blocks=len(fragments))
    try:
        made = asked.map(lambda row: _sorted_text(job, fragments[row["number"]], shards), num_cpus=1).take_all()
    except ray.exceptions.RayError as error:
        raise unwrap_error(error, StorageError, "the input could not be sorted", where=job.path, fix="run again to go on") from error
    return [PartFile.model_validate_json(row["part"]) for row in sorted(made, key=lambda row: int(row["number"]))]


def _sorted_text(job: Job, fragment: Fragment, shards: int) -> dict[str, Any]:
    return {"number": fragment.number, "part": sort_fragment(job, fragment, shards).model_dump_json()}


def sort_fragment(job: Job, fragment: Fragment, shards: int) -> PartFile:
    """One part file from one fragment: its rows in order of shard, and within a shard in order of input."""
    store = open_storage(job.root)
    with open_table(store, fragment.table.path) as file:
        table = file.read_row_groups(list(fragment.groups))
        if not job.side_inputs:
            table = table.drop_columns([name for name in job.task.side_inputs if name in table.column_names])
        table = input_rows(table, job.task.side_inputs, fragment.table.label)
    owner = shards_of(table["query_key"], shards)
    order = np.argsort(owner, kind="stable")
    table, owner = table.take(pa.array(order)), owner[order]
    numbers, starts = np.unique(owner, return_index=True)
    ends = [*starts[1:].tolist(), len(owner)]
    with tempfile.TemporaryDirectory(prefix="headtail-part-") as folder:
        local, places, sums = Path(folder) / "part.arrow", [], []
        with storage_errors("write", str(local)), local.open("wb") as file:
            for start, end in zip(starts.tolist(), ends, strict=True):
                run = encode_run(table.slice(start, end - start))
                file.write(run)
                places.append(file.tell())
                sums.append(zlib.crc32(run))
        ref = put(store, local, job.part_path(fragment.number), table.num_rows)
    return PartFile(file=ref, shards=tuple(numbers.tolist()), ends=tuple(places), sums=tuple(sums))


def encode_run(table: pa.Table) -> pa.Buffer:
    """The rows of one shard as a run of a part file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def input_rows(table: pa.Table, side_inputs: Sequence[str], label: str) -> pa.Table:
    """`table` in the INPUT schema. A table of human labels is eval_only as a whole; side inputs it lacks are null."""
    have = set(table.column_names)
    rows = table.num_rows
    fill: dict[str, Any] = {
        "count": pa.repeat(pa.scalar(1, pa.int64()), rows),
        "stratum": pa.repeat(pa.scalar("", pa.string()), rows),
        "eval_only": pa.repeat(pa.scalar("answer" in have), rows),
    }
    schema = with_side_inputs(INPUT, side_inputs)
    fill |= {name: pa.nulls(rows, schema.field(name).type) for name in side_inputs}
    for name, column in fill.items():
        if name not in have:
            table = table.append_column(name, column)
    made = conform(table, schema, label)
    for name in ("query_key", "query"):
        if made[name].null_count:
            raise InputError(f"{made[name].null_count} rows have no {name}", where=label, fix="run the stage that made this table again")
    return made


def read_shard(store: Storage, manifest: InputManifest, shard: int, columns: list[str] | None = None) -> pa.Table:
    """All input rows of one shard, duplicates included, in order of input."""
    pieces = []
    for part in manifest.parts:
        at = bisect.bisect_left(part.shards, shard)
        if at < len(part.shards) and part.shards[at] == shard:
            try:
                pieces.append(read_run(store, part, at, columns))
            except (OSError, pa.ArrowInvalid) as error:
                fix = "remove the job's work folder and run again: finished shards are kept"
                where = store.uri(part.file.path)
                raise StorageError(f"a part of the sorted input cannot be read: {error}", where=where, fix=fix) from error
    return pa.concat_tables(pieces) if pieces else pa.table({})


def read_run(store: Storage, part: PartFile, at: int, columns: list[str] | None = None) -> pa.Table:
    """Run `at` of a part file. OSError when its bytes are not those that were written."""
    begin, end = part.ends[at - 1] if at else 0, part.ends[at]
    with store.open(part.file.path) as file:
        run = file.read_at(end - begin, begin)
    if len(run) != end - begin or zlib.crc32(run) != part.sums[at]:
        raise OSError(f"bytes {begin} to {end} are not those that were written")
    with pa.ipc.open_stream(run) as reader:
        table = reader.read_all()
    return table.select(columns) if columns is not None else table
