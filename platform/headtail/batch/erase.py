"""Take queries out of a precompute job's own files: its sorted input, and the counts in the receipts of its shards.

In: the folder of a job, query keys; then the answers files that somebody has rewritten without those rows. Out: files that add up again,
so that the job is found done, or goes on, as if the queries had never been asked. Each step may be repeated after a kill.
"""

from __future__ import annotations

import tempfile
import uuid
import zlib
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, put, read_record, read_table
from headtail.batch.job import JobFolder, ShardReceipt, edition_count
from headtail.batch.prepare import InputManifest, PartFile, encode_run, read_run, read_shard
from headtail.core.receipt import FileRef
from headtail.core.rows import KEY, State


def erase_input(store: Storage, folder: str, keys: Collection[bytes]) -> int:
    """Take `keys` out of the sorted input of the job at `folder`; how many rows had them. New part files first, then the manifest."""
    job = JobFolder(folder)
    if not store.exists(job.manifest_path()):
        return 0
    manifest = read_record(store, InputManifest, job.manifest_path())
    parts = [_part_without(store, job, part, keys) for part in manifest.parts]
    gone = sum((old.file.rows or 0) - (new.file.rows or 0) for old, new in zip(manifest.parts, parts, strict=True))
    if gone:
        made = manifest.model_copy(update={"parts": tuple(parts), "rows": manifest.rows - gone})
        store.replace(job.manifest_path(), made.model_dump_json(indent=1).encode())
    used = {part.file.path for part in parts}
    for one in store.files(f"{folder}/work/parts"):
        if one.path not in used:  # the part before, or one of a call that was killed
            store.discard(one)
    return gone


def _part_without(store: Storage, job: JobFolder, part: PartFile, keys: Collection[bytes]) -> PartFile:
    runs = [read_run(store, part, at) for at in range(len(part.shards))]
    left = [run.filter(pc.invert(pc.is_in(run["query_key"], value_set=pa.array(list(keys), KEY)))) for run in runs]
    if all(one.num_rows == other.num_rows for one, other in zip(runs, left, strict=True)):
        return part
    with tempfile.TemporaryDirectory(prefix="headtail-part-") as scratch:
        local, ends, sums = Path(scratch) / "part.arrow", [], []
        with local.open("wb") as file:
            for run in left:
                data = encode_run(run)
                file.write(data)
                ends.append(file.tell())
                sums.append(zlib.crc32(data))
        name = f"{job.path}/work/parts/part-{uuid.uuid4().hex[:8]}.arrow"
        ref = put(store, local, name, sum(run.num_rows for run in left))
    return part.model_copy(update={"file": ref, "ends": tuple(ends), "sums": tuple(sums)})


def recount_shards(store: Storage, folder: str, changed: dict[str, FileRef]) -> int:
    """Write the receipts of shards whose answers `changed` (by path) anew, with the counts that hold now; how many."""
    job, count = JobFolder(folder), 0
    if not store.exists(job.manifest_path()):
        return 0
    manifest = read_record(store, InputManifest, job.manifest_path())
    for shard in sorted({shard for part in manifest.parts for shard in part.shards}):
        for edition in range(edition_count(job, store, shard)):
            path = job.receipt_path(shard, edition)
            receipt = read_record(store, ShardReceipt, path)
            if receipt.answers.path in changed:
                held = changed[receipt.answers.path]
                made = _recounted(store, receipt, held, read_shard(store, manifest, shard, ["query_key"]).num_rows)
                store.replace(path, made.model_dump_json(indent=1).encode())
                count += 1
    return count


def _recounted(store: Storage, receipt: ShardReceipt, answers: FileRef, asked: int) -> ShardReceipt:
    table = read_table(store, answers, ["state", "runs"])
    states = Counter(table["state"].to_pylist())
    failed = table.filter(pc.equal(table["state"], str(State.FAILED)))["runs"].to_pylist()
    counts = {"rows": table.num_rows, "states": dict(states), "duplicates": asked - table.num_rows, "failed_runs": dict(Counter(failed))}
    return receipt.model_copy(update={"answers": answers, **counts})
