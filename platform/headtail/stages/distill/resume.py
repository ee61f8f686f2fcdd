"""What a new run reports about earlier unfinished runs: whether it continues one, or begins anew, and why.

In: the store, the run's folder, what it is made of. Out: sentences. A run with other settings or data has another fingerprint and folder,
so it never continues a checkpoint that does not fit. Without a message a user would believe that it does. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from headtail.adapters.storage import Storage, read_json, read_record
from headtail.stages.distill.checkpoints import Marker

MARKER = "work/checkpoints/COMPLETE"
SETTINGS = "work/settings.json"
MOST = 4  # differences that are named


def earlier_run(store: Storage, path: str, now: Mapping[str, Any]) -> list[str]:
    """A sentence for each unfinished run of the same kind for the same tasks that left a checkpoint."""
    said = []
    for file in store.files(path.partition("/")[0]):
        run = file.path.removesuffix(f"/{MARKER}")
        if run == file.path or store.exists(f"{run}/receipt.json") or not store.exists(f"{run}/{SETTINGS}"):
            continue
        step, then = read_record(store, Marker, file.path).state.step, read_json(store, f"{run}/{SETTINGS}")
        if run == path:
            said.append(f"goes on after step {step}")
        elif (then.get("student"), _tasks(then)) == (now["student"], _tasks(now)):
            found = list(config_differences(then, now))
            more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
            said.append(f"begins anew: {run}, left after step {step}, differs in {', '.join(found[:MOST])}{more}")
    return said


def config_differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """Names and values of what differs between two plain values."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}):
            yield from config_differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield name if max(len(str(then)), len(str(now))) > 20 else f"{name} ({then}, now {now})"


def _tasks(settings: Mapping[str, Any]) -> list[str]:
    return [one["task"] for one in settings.get("sets", ())]
