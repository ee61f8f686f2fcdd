"""Cache: how fast a snapshot is built, how large it is, how fast a lookup is; SQLite, RocksDB and Redis in the same run.

    python -m tests.bench.cache --keys 10000000

In: a number of keys. Out: a table, and build/bench/cache.json. The input, sorted Parquet of made-up rows, is written first
and not counted. Build: from that Parquet to a store that is on disk. Lookup: from normalised text to decoded JSON, warm,
keys drawn at random, one after another. Needs some 0.5 KB of disk per key, and for Redis 0.3 KB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headtail.adapters.storage import open_storage
from headtail.cache import Cache, open_snapshot, publish_snapshot
from headtail.cache.builder import OFFERED, build_snapshot, cut_pieces, merge_streams
from headtail.cache.lmdb_file import LmdbFile, Values, fixed_width
from headtail.cache.snapshot import decode_value
from headtail.core.keys import KEY_BYTES, query_key

from .machine import write_figures
from .rivals import Rival, rivals

LOOKUPS, WARM = 200_000, 1_000_000  # lookups measured; looked up before, or as many as there are keys
STEP = 131_072
DISHES = ("ramen", "sushi", "pizza", "tapas", "bagel", "curry", "tacos", "pho", "steak", "salad", "vegan", "brunch", "kebab", "oyster")
KINDS = ("cheap", "best", "late", "open", "new", "quiet", "nearby", "family")
PLACES = ("soho", "camden", "harlem", "mission", "marais", "kreuzberg", "shibuya", "leith", "docklands", "bairro", "gracia", "chelsea")


class Row(NamedTuple):
    """One store's figures."""

    name: str
    build_rows_per_s: float
    build_rows_per_cpu_s: float  # of this process: the processor time of another one (Redis) is not seen
    size_ratio: float  # bytes taken over bytes of key, query and answer
    lookup_p50_us: float
    lookup_p99_us: float
    settings: str


def texts(ids: npt.NDArray[np.int64]) -> tuple[pa.Array, pa.Array]:
    """Query and answer of each id: about 22 and 95 bytes."""
    rest = ids
    words = []
    for names in (KINDS, DISHES, PLACES):
        words.append(pa.array(names).take(pa.array(rest % len(names))))
        rest = rest // len(names)
    join = pc.binary_join_element_wise
    topic, place = join(words[0], words[1], " "), join(words[2], pa.array(rest).cast(pa.string()), " ")
    answer = join('{"segments":[{"label":"topic","text":"', topic, '"},{"label":"location","text":"', place, '"}]}', "")
    return join(topic, place, " "), answer


def make_input(path: Path, keys: int) -> int:
    """Sorted Parquet of `keys` rows in OFFERED's columns; returns the bytes of key, query and answer together."""
    hashed = []
    for start in range(0, keys, STEP):
        queries = texts(np.arange(start, min(start + STEP, keys)))[0].to_pylist()
        hashed.append(np.frombuffer(b"".join(map(query_key, queries)), ">u8").reshape(-1, 2))
    words = np.concatenate(hashed)
    order = np.lexsort((words[:, 1], words[:, 0]))
    raw = 16 * keys
    with pq.ParquetWriter(path, OFFERED, compression="zstd") as writer:
        for start in range(0, keys, STEP):
            ids = order[start : start + STEP]
            query, answer = texts(ids)
            raw += sum(int(pc.sum(pc.binary_length(text)).as_py()) for text in (query, answer))
            columns = {
                "query_key": _keys(words[ids]),
                "query": query,
                "answer": answer,
                "confidence": pa.array((ids % 1009 / 1009).astype(np.float32)),
                "source": pa.array(["teacher"] * len(ids)),
                "answer_key": _keys(words[ids][:, ::-1] ^ np.uint64(0x5DEECE66D)),
                "count": pa.array(1 + keys // (ids + 1)),
                "state": pa.array(["answered"] * len(ids)),
            }
            writer.write_table(pa.table(columns, OFFERED), row_group_size=STEP)
    return raw


def _keys(words: npt.NDArray[np.uint64]) -> pa.Array:
    data = np.ascontiguousarray(words).astype(">u8").tobytes()
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(words), [None, pa.py_buffer(data)])


def read(path: Path) -> Iterator[pa.Table]:
    """The input as a stream; on one thread."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=STEP, use_threads=False):
            yield pa.Table.from_batches([batch])


def pairs(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """What each store holds, in order of key."""
    for piece in read(path):
        values = Values(piece)
        body = values.body.to_pybytes()
        rows = (body[a:b] for a, b in pairwise(values.ends.tolist()))
        yield from zip(fixed_width(piece.column("query_key"), KEY_BYTES).tolist(), rows, strict=True)


def timed(work: Callable[[], Any], keys: int) -> tuple[float, float]:
    """Rows per second by the clock and by this process's processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return keys / (time.perf_counter() - clock), keys / (time.process_time() - processor)


def lookups(get: Callable[[str], Any], keys: int) -> tuple[float, float]:
    """p50 and p99 of `get(normalised text)` in microseconds, over keys drawn at random; it must not return None."""
    warm, number = min(keys, WARM), LOOKUPS
    asked = texts(np.random.default_rng(7).integers(0, keys, warm + number))[0].to_pylist()
    for text in asked[:warm]:
        get(text)
    clock, seen = time.perf_counter_ns, np.empty(number)
    for i, text in enumerate(asked[warm:]):
        start = clock()
        found = get(text)
        seen[i] = clock() - start
        if found is None:
            raise AssertionError(f"{text!r} is not found")
    p50, p99 = np.percentile(seen / 1000, (50, 99))
    return float(p50), float(p99)


def of_headtail(folder: Path, source: Path, keys: int, raw: int) -> tuple[Row, dict[str, float]]:
    """Our own figures; and those that only we have: the whole build (LMDB, Parquet, digests, counts, checks), other ways to look up."""

    def lmdb_file() -> None:
        made = LmdbFile(folder / "alone")
        for piece in cut_pieces(merge_streams([read(source)], {}, Counter(), ["input"])):
            made.add(piece, Values(piece))
        made.finish()

    alone = timed(lmdb_file, keys)
    shutil.rmtree(folder / "alone")
    (work := folder / "work").mkdir()
    clock = time.perf_counter()
    built = build_snapshot([read(source)], work)
    whole = keys / (time.perf_counter() - clock)
    if built.rows != keys or built.left_out:
        raise AssertionError(f"{built.rows} of {keys} rows built, {built.left_out}")
    store = open_storage(str(folder / "store"))
    manifest = publish_snapshot(store, built, task="bench", task_fingerprint="bench")
    opened = open_snapshot(store, manifest.id)
    check(opened, keys)
    found = lookups(lambda text: opened.get(text).plain_answer(), keys)  # type: ignore[union-attr]
    plainly = lookups(lambda text: json.loads(opened.get(text).answer), keys)  # type: ignore[union-attr]
    missed = lookups(lambda text: opened.get(text + "x") is None, keys)
    more = {"whole_build_rows_per_s": whole, "lookup_json_loads_p50_us": plainly[0], "lookup_json_loads_p99_us": plainly[1]}
    more |= {"miss_p50_us": missed[0], "miss_p99_us": missed[1]}
    size = manifest.files["lmdb"].bytes / raw
    opened.close()
    settings = "appended in order of key, transactions of 16,384 rows, synced and read back at the end; read-only, no locks"
    return Row("headtail (LMDB)", *alone, size, *found, settings), more


def check(opened: Cache, keys: int) -> None:
    """What is looked up is what was put in, and what was not put in is not found."""
    ids = np.array(random.Random(3).sample(range(keys), min(keys, 1000)))
    for query, answer in zip(*(text.to_pylist() for text in texts(ids)), strict=True):
        found = opened.get(query)
        assert found is not None
        assert found.answer == answer
    assert opened.get("no such query") is None


def of_rival(rival: Rival, folder: Path, source: Path, keys: int, raw: int) -> Row:
    """One rival's figures. A lookup does the same as ours around the store: hash, compare the text, decode."""
    try:
        build = timed(lambda: rival.load(folder, pairs(source)), keys)

        def get(text: str) -> Any:
            value = rival.get(query_key(text))
            found = None if value is None else decode_value(value, text)
            return None if found is None else found.plain_answer()

        found = lookups(get, keys)
        return Row(rival.name, *build, rival.bytes() / raw, *found, rival.settings)
    finally:
        rival.close()


def run(keys: int, folder: Path) -> tuple[list[Row], dict[str, float]]:
    """Rows of the table, ours first; and figures that only we have."""
    source = folder / "input.parquet"
    raw = make_input(source, keys)
    ours, more = of_headtail(folder, source, keys, raw)
    rows = [ours]
    show(ours)
    for rival in rivals():
        (place := folder / f"rival-{len(rows)}").mkdir()
        rows.append(of_rival(rival, place, source, keys, raw))
        show(rows[-1])
        shutil.rmtree(place)
    return rows, {"keys": float(keys), "raw_bytes_per_row": raw / keys, **more}


def figures(keys: int = 10_000_000, folder: Path | None = None) -> dict[str, float]:
    """All figures by name: ours plain, the rivals' as name/figure. `folder`: where files go; default a temporary one."""
    with tempfile.TemporaryDirectory(prefix="headtail-bench-", dir=folder) as scratch:
        return plain(*run(keys, Path(scratch)))


def plain(rows: list[Row], more: dict[str, float]) -> dict[str, float]:
    """The figures of a run as one mapping."""
    named = {
        f"{'' if row is rows[0] else row.name + '/'}{name}": value
        for row in rows
        for name, value in row._asdict().items()
        if isinstance(value, float)
    }
    return {name: round(value, 4) for name, value in {**named, **more}.items()}


def show(row: Row) -> None:
    print(
        f"{row.name:<16} {row.build_rows_per_s:>12,.0f} {row.build_rows_per_cpu_s:>14,.0f} {row.size_ratio:>8.3f} "
        f"{row.lookup_p50_us:>10.2f} {row.lookup_p99_us:>10.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10_000_000, help="rows (default 10 million)")
    parser.add_argument("--folder", type=Path, help="a local disk with room; default TMPDIR")
    parser.add_argument("--out", type=Path, default=Path("build/bench/cache.json"), help="where the figures go")
    flags = parser.parse_args()
    print(f"{flags.keys:,} keys; build in rows/s, and rows per second of this process's processor time; size over raw bytes; lookup in us")
    print(f"{'':<16} {'build':>12} {'per CPU s':>14} {'size':>8} {'p50':>10} {'p99':>10}")
    with tempfile.TemporaryDirectory(prefix="headtail-bench-", dir=flags.folder) as scratch:
        rows, more = run(flags.keys, Path(scratch))
    for name, value in more.items():
        print(f"{name:<28} {value:>14,.2f}")
    machine = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    versions = {name: version(name) for name in ("lmdb", "pyarrow", "rocksdict") if find_spec(name)}
    found = {
        "figures": plain(rows, more),
        "settings": {row.name: row.settings for row in rows},
        "machine": machine,
        "versions": versions,
    }
    write_figures(flags.out, found)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
