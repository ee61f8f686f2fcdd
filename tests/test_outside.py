"""The list of what a run opened outside its own folders: it records, and it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from outside.__main__ import judge, main

HOOK = Path(__file__).parent / "outside"


def recorded(tmp_path: Path, code: str) -> Path:
    """The lists that a small program and its child leave, with `tmp_path/own` as its own folder."""
    reads, own = tmp_path / "own" / "reads", tmp_path / "own"
    reads.mkdir(parents=True)
    env = {**os.environ, "PYTHONPATH": str(HOOK), "HEADTAIL_READS": str(reads), "HEADTAIL_INSIDE": f"{own}/"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    return reads


def test_a_file_from_elsewhere_is_named_also_when_a_child_opened_it(tmp_path: Path) -> None:
    cache, own = tmp_path / "cache" / "wheel", tmp_path / "own" / "mine"
    cache.parent.mkdir()
    cache.write_text("built otherwise")
    reading = f"open({str(cache)!r})"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {reading!r}], check=True); open({str(own)!r}, 'w')"
    reads = recorded(tmp_path, child)
    assert main([str(reads)]) == 1
    lines = [line for path in reads.iterdir() for line in path.read_text().splitlines()]
    assert judge(lines, ["/usr/", f"{sys.base_prefix}/"]).elsewhere == [str(cache)]
    assert main([str(reads), str(cache.parent)]) == 0


def test_nothing_recorded_is_a_failure(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 1


def test_programs_are_listed_and_a_folder_counts_as_inside_itself() -> None:
    verdict = judge(["subprocess.Popen\t/usr/bin/g++", "open\t/usr", "open\t/usrx"], ["/usr/"])
    assert verdict.programs == {"g++": 1}
    assert verdict.elsewhere == ["/usrx"]
