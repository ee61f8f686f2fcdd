"""What one run of a job is told, and how a forked one is started. Imports nothing heavy: the harness itself needs none of it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
SLOWER = float(os.environ.get("HEADTAIL_TEST_TIME_SCALE", "1"))  # as in tests/timescale.py, which chaos alone cannot import
NO_LEASE = "HEADTAIL_CHAOS_NO_LEASE"  # in the environment of a run: it does not wait for another driver
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
    return _forked("run", spec)


def start_making(root: str, queries: list[str], environment: dict[str, str]) -> BaseProcess:
    """A store with a plan of these queries being made, likewise."""
    return _forked("make", root, queries, environment)


def warm() -> None:
    """Start the server that forks, if it does not run: PYTHONPATH is set for it alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_INSIDE])
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), str(TESTS.parent), kept)))
    try:
        process = context.Process(target=_nothing)
        process.start()
        process.join()
    finally:
        os.environ.pop("PYTHONPATH") if kept is None else os.environ.update(PYTHONPATH=kept)


_INSIDE = f"{__package__}.inline"


def _forked(name: str, *args: Any) -> BaseProcess:
    process = multiprocessing.get_context("forkserver").Process(target=_call, args=(name, args), daemon=True)
    process.start()
    return process


def _call(name: str, args: tuple[Any, ...]) -> None:
    getattr(importlib.import_module(_INSIDE), name)(*args)


def _nothing() -> None:
    pass
