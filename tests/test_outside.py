"""The list of what a run opened outside its own folders: it records, and it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_compiler_fails_the_run_where_none_may_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reads = recorded(tmp_path, "import subprocess, shutil; subprocess.run([shutil.which('true'), '--version'])")
    assert main([str(reads), sys.base_prefix, "--no-compilers"]) == 0
    outside = tmp_path / "bin"
    outside.mkdir()
    (outside / "g++").symlink_to("/bin/true")
    code = f"import os, subprocess; subprocess.run(['g++', 'x.cpp'], env={{'PATH': {str(outside)!r}}}, check=True)"
    recorded(tmp_path / "second", code)
    assert main([str(tmp_path / "second" / "own" / "reads"), sys.base_prefix]) == 0
    assert main([str(tmp_path / "second" / "own" / "reads"), sys.base_prefix, "--no-compilers"]) == 1
    assert "error: a compiler was started: g++" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gcc", "g++", "cc", "c++", "clang-18", "x86_64-linux-gnu-g++-12", "nvcc", "ninja", "rustc", "cc1plus"])
def test_programs_that_compile(name: str) -> None:
    assert judge([f"os.posix_spawn\t/opt/bin/{name}"], []).compilers == [name]


@pytest.mark.parametrize("name", ["bash", "lscpu", "fc-list", "python3.11", "uname", "gccgo-docs", "access"])
def test_programs_that_do_not_compile(name: str) -> None:
    assert not judge([f"os.exec\t/bin/{name}"], []).compilers


def test_programs_are_listed_and_a_folder_counts_as_inside_itself() -> None:
    verdict = judge(["subprocess.Popen\t/usr/bin/g++", "open\t/usr", "open\t/usrx"], ["/usr/"])
    assert verdict.programs == {"g++": 1}
    assert verdict.elsewhere == ["/usrx"]
