"""No process of a server writes a secret of its environment into its log, not even in a stack trace."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import headtail
from timescale import limit

PACKAGE = Path(headtail.__file__).parent
SECRET = "planted-9f8e7d6c5b4a"
PROGRAMS = sorted(
    path for path in (PACKAGE / "stages" / "serve").rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_every_program_of_a_server_hides_secrets_first() -> None:
    assert len(PROGRAMS) >= 4
    for path in PROGRAMS:
        (main,) = (
            node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef) and node.name == "main"
        )
        first = main.body[1] if ast.get_docstring(main) else main.body[0]
        assert ast.unparse(first) == "hide_in_output()", module(path)


@pytest.mark.parametrize("path", PROGRAMS, ids=map(module, PROGRAMS))
def test_a_program_that_dies_shows_no_secret(path: Path, tmp_path: Path) -> None:
    """The stack trace names the file that is absent, whose name holds a secret."""
    environment = {**os.environ, "STORE_TOKEN": SECRET, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", module(path), str(tmp_path / f"plan-{SECRET}.json"), "0"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=limit(60), stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "***" in done.stderr
    assert SECRET not in done.stderr + done.stdout
