"""Systems that are compared run in turn, each run in a process of its own, so that a slow minute of the machine meets them all.

In: names, and the command that runs one of them. Out: what each run said of itself, its lines of JSON. Knows nothing of systems.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from headtail.adapters.progress import progress_bar


def in_turn(
    systems: Sequence[str], repeats: int, command: Callable[[str], Sequence[str]], places: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Every system `repeats` times: its last line of JSON, with `system`, and under `said` the lines before it."""
    runs = []
    with progress_bar("systems in turn", repeats * len(systems), "runs") as shown:
        for turn in range(repeats):
            for system in systems if turn % 2 == 0 else reversed(systems):
                runs.append({"system": system, **_one(command(system), places or {})})
                shown.advance(1)
    return runs


def _one(command: Sequence[str], places: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **places})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    said = list(_spoken(done.stdout))
    return {**said[-1], "said": said[:-1]}


def _spoken(text: str) -> Iterator[dict[str, Any]]:
    """Its lines of JSON: libraries print what looks alike (transformers' Trainer does) and is none."""
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
