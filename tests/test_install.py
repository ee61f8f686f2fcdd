"""The install script: steps in order, and a failure in one line that says which step, why, and where the log is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
SCRIPT = REPO / "requirements" / "install.sh"

UNPATCHED_BUILD = """  error: subprocess-exited-with-error
  × Preparing metadata (pyproject.toml) did not run successfully.
      Traceback (most recent call last):
        File "<string>", line 1, in <module>
      TypeError: Command.__init__() got an unexpected keyword argument 'use_ninja'
  note: This error originates from a subprocess, and is likely not a problem with pip.
error: metadata-snapshot-failed"""
NO_INDEX = (
    "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu\nERROR: No matching distribution found for torch"
)


def install(tmp_path: Path, output: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the script with an interpreter that prints `output` and fails whenever pip installs the locked packages or torch."""
    venv, log = tmp_path / "venv", tmp_path / "build" / "install.log"
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "output").write_text(output)
    python.write_text(f'#!/bin/sh\ncase "$*" in *torch.txt*|*cpu.lock*) cat "{tmp_path}/output"; exit 1 ;; esac\n')
    python.chmod(0o755)
    done = subprocess.run([str(SCRIPT), str(venv), str(python), str(log)], capture_output=True, text=True, check=False)
    return done, log


@pytest.mark.parametrize(
    "output, reason",
    [
        (UNPATCHED_BUILD, "TypeError: Command.__init__() got an unexpected keyword argument 'use_ninja'"),
        (NO_INDEX, "ERROR: No matching distribution found for torch"),
        ("killed\n\n", "killed"),
        ("", "== PyTorch for CPU: torch"),
    ],
)
def test_a_failed_step_is_one_line_with_its_reason_and_its_log(tmp_path: Path, output: str, reason: str) -> None:
    done, log = install(tmp_path, output)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f'error: install failed at "PyTorch for CPU": {reason} (whole log: {log})']
    assert output.strip() in log.read_text()


def test_the_make_target_runs_the_script_and_marks_the_install_only_after_it() -> None:
    recipe = (REPO / "Makefile").read_text().partition("$(INSTALLED): ")[2].partition("\n\n")[0]
    assert recipe.index("requirements/install.sh") < recipe.index("touch $@")


def test_the_locked_setuptools_builds_deepspeed() -> None:
    """77.0.3 loads distutils' build_ext before it patches it; DeepSpeed's build then ends with a TypeError. 78.1.1 and later are fine."""
    for name in ("cpu.lock", "gpu.lock"):
        pins = (REPO / "requirements" / name).read_text()
        version = pins.partition("\nsetuptools==")[2].split()[0]
        assert tuple(map(int, version.split("."))) >= (78, 1, 1)
