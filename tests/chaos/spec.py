"""What one run of a job is told, and how a forked one is started. Imports nothing heavy: the harness itself needs none of it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
DONE, DELIBERATE, UNFORESEEN = 0, 3, 4  # exit codes of a run


@dataclass(frozen=True)
class Spec:
    """One run. `run` is the run's name in headtail: the same name again means that Ray brought the worker back."""

    fields: dict[str, Any]
    plan: str
    said: str
    run: str
    environment: dict[str, str] = field(default_factory=dict)


def start(spec: Spec) -> BaseProcess:
    """The run, started in a fork of a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    inside = f"{__package__}.inline"
    context.set_forkserver_preload([inside])
    process = context.Process(target=_run, args=(inside, spec), daemon=True)
    with _path():
        process.start()
    return process


def _run(inside: str, spec: Spec) -> None:
    importlib.import_module(inside).run(spec)


@contextmanager
def _path() -> Iterator[None]:
    """PYTHONPATH with this package on it, for the server when it starts."""
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), str(TESTS.parent), kept)))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if kept is None else os.environ.update(PYTHONPATH=kept)
