"""The package and its command line import on the other Pythons of its metadata. The lock, and every other test, is for 3.11.

Interpreters come from HEADTAIL_PYTHONS (paths, with colons between them) or from the PATH. Only what the import needs is
installed, in the lock's versions where they exist for that Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
NEEDED = (
    "cloudpickle",
    "httpx",
    "jinja2",
    "jsonschema-rs",
    "lmdb",
    "msgspec",
    "numpy",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "rapidfuzz",
    "rich",
    "scipy",
    "typer",
)
NO_NETWORK = re.compile(r"Temporary failure in name resolution|Network is unreachable|Failed to establish a new connection")
EVERY = """
import importlib, pkgutil, headtail
for module in pkgutil.iter_modules(headtail.__path__, "headtail."):
    importlib.import_module(module.name)
for floor in ("adapters", "cli", "core", "stages", "studies"):
    for module in pkgutil.iter_modules([f"{headtail.__path__[0]}/{floor}"], f"headtail.{floor}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def interpreter(version: str) -> str | None:
    """A Python of that version that starts, or None."""
    named = [path for path in os.environ.get("HEADTAIL_PYTHONS", "").split(":") if path]
    for path in [*named, shutil.which(f"python{version}") or ""]:
        asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if path and subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return path
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_the_package_and_its_command_line_import(version: str, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on the PATH or in HEADTAIL_PYTHONS")
    subprocess.run([python, "-m", "venv", tmp_path], check=True)
    own = str(tmp_path / "bin" / "python")
    pinned = dict(line.split()[0].split("==") for line in (REPO / "requirements" / "cpu.lock").read_text().splitlines() if line[0] != "#")
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--only-binary", ":all:"]
    done = subprocess.run([*pip, *(f"{name}=={pinned[name]}" for name in NEEDED)], capture_output=True, text=True, check=False)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(REPO / "platform")}
    for command in (["-c", EVERY], ["-m", "headtail.cli", "--help"], ["-m", "headtail.cli", "fields", "plan"]):
        ran = subprocess.run([own, *command], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert command[0] == "-c" or len(ran.stdout + ran.stderr) > 500


def test_the_metadata_names_the_pythons_that_are_tried() -> None:
    text = (REPO / "pyproject.toml").read_text()
    assert re.findall(r"Python :: (3\.\d+)", text) == ["3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.11,<3.14"' in text
