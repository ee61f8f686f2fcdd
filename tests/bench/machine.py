"""What a figure was measured on: the machine, the versions, the day and the command. Every benchmark writes it beside its figures."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headtail.stages.base import versions


def machine() -> dict[str, Any]:
    """Machine, versions, date, command: plain values."""
    return {
        "machine": f"{os.cpu_count()} x {processor()}, {memory_gib():.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def write_figures(out: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"written: {out}")


def run_parts(about: str, parts: Mapping[str, Callable[[], Mapping[str, Any]]], out: Path, arguments: Sequence[str] | None = None) -> None:
    """A program that runs some of `parts`, or all, one after the other, and writes the figures of all to one file."""
    parser = argparse.ArgumentParser(prog=f"python -m {_module()}", description=about)
    parser.add_argument("--only", nargs="*", choices=sorted(parts), help="parts to run; without it all")
    parser.add_argument("--out", type=Path, default=out)
    chosen = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    for name in chosen.only or parts:
        print(f"== {name}", flush=True)
        figures |= parts[name]()
    write_figures(chosen.out, {**machine(), "figures": figures})


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_gib() -> float:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return str(spec.name) if spec is not None else Path(sys.argv[0]).name
