"""The benchmark of the cache measures what it says, on a small set: every store holds and finds every row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.cache import figures, make_input, read
from headtail.cache.merge import sorted_batches
from timescale import limit


@pytest.mark.slow
def test_figures_of_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cache.LOOKUPS", 500)
    found = figures(3000, tmp_path)
    stores = {name.partition("/")[0] for name in found if "/" in name}
    assert "SQLite" in stores  # the others when they are installed
    for prefix in ("", *(f"{name}/" for name in stores)):
        for name in ("build_rows_per_s", "build_rows_per_cpu_s", "size_ratio", "lookup_p50_us", "lookup_p99_us"):
            assert found[prefix + name] > 0
    assert found["keys"] == 3000
    assert 110 < found["raw_bytes_per_row"] < 150
    assert 1 < found["size_ratio"] < 1.35
    assert found["whole_build_rows_per_s"] > 0
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_input_is_sorted_and_whole(tmp_path: Path) -> None:
    raw = make_input(tmp_path / "in.parquet", 5000)
    batches = list(sorted_batches(read(tmp_path / "in.parquet"), "input"))
    assert sum(batch.table.num_rows for batch in batches) == 5000
    queries = pq.read_table(tmp_path / "in.parquet", columns=["query", "answer"])
    assert len(set(queries["query"].to_pylist())) == 5000
    assert raw == 16 * 5000 + sum(len(text.encode()) for name in ("query", "answer") for text in queries[name].to_pylist())


def test_the_command_line_says_what_it_takes() -> None:
    command = [sys.executable, "-m", "tests.bench.cache", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=limit(60))
    assert shown.returncode == 0, shown.stderr
    assert "--keys" in shown.stdout
