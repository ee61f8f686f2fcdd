"""The command line of the crash harness. See `python -m tests.chaos --help` and docs/chaos.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from headtail.adapters.progress import progress_bar

from . import report
from .bench import Lab
from .harness import ENGINES, Harness, Kind, Tally, cannot

_ABOUT = """Kill a precompute job anywhere, let it go on, and check by other means than its own books that every row is there once.

  python -m tests.chaos --kills 100                      a tenth of everything, some 4 minutes
  python -m tests.chaos --kills 1000                     all kinds in full, below 40 minutes on 2 cores
  python -m tests.chaos --engine vllm --kills 30         the real engine: some 10 s per kill
  python -m tests.chaos --only commit.disk,twin.s3       some kinds
  python -m tests.chaos --seed 7 --only twin.disk/12 --left 5    one job again, as a failure tells

Exit code 0: nothing missing, duplicated, unreadable or wrong, nothing paid twice after success, and no kill cost more than
60 s of the job. 1: otherwise; failed jobs keep their folder and say how to run them again. Needs no network; S3 is moto's
server. Only processes that it started are killed."""


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    if asked.list:
        _list()
        return 0
    names, _, number = asked.only.partition("/")
    wanted = list(filter(None, names.split(",")))
    chosen = [kind for kind in ENGINES[asked.engine] if not wanted or kind.name in wanted]
    if unknown := set(wanted) - {kind.name for kind in chosen}:
        print(f"no kind {', '.join(unknown)} for engine {asked.engine}: see --list", file=sys.stderr)
        return 2
    started = time.monotonic()
    with Lab(asked.folder, asked.seed, asked.engine) as lab:
        tallies = _run(lab, chosen, asked, int(number) if number else None)
        command = f"python -m tests.chaos {' '.join(sys.argv[1:] if arguments is None else arguments)}"
        found = report.document(tallies, lab, asked.kills, time.monotonic() - started, command)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _show(found, asked.out)
    return 0 if found["held"] else 1


def _run(lab: Lab, chosen: list[Kind], asked: argparse.Namespace, job: int | None) -> list[Tally]:
    struck: dict[str, int] = {}
    with progress_bar("chaos", 0, "kills") as shown:

        def told(tally: Tally) -> None:
            struck[tally.kind.name] = min(tally.struck, tally.budget)
            shown.update(min(sum(struck.values()), harness.total))
            for failure in tally.failures[-1:] if tally.failures else ():
                if failure not in said:
                    said.append(failure)
                    print(f"{failure['job']}: {failure['problems']}\n  again: {failure['reproduce']}", file=sys.stderr)

        said: list[dict[str, object]] = []
        harness = Harness(lab, chosen, asked.kills, told)
        shown.total = harness.total
        if shown.rich is not None:
            shown.rich.update(shown.rich.task_ids[0], total=harness.total)
        return harness.run(job, asked.left)


def _show(found: dict[str, object], out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(report.table(found))
    for name, why in dict(found["skipped"]).items():  # type: ignore[call-overload]
        console.print(f"skipped {name}: {why}")
    console.print(f"{'held' if found['held'] else '[red]did not hold[/]'}; {out}")


def _list() -> None:
    for engine, kinds in ENGINES.items():
        for kind in kinds:
            why = cannot(kind)
            print(f"{engine:<5} {kind.name:<14} {kind.what}{f' (not here: {why})' if why else ''}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.chaos", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all, spread over the kinds (default 100)")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="null", help="null: answers at once; vllm: the reference teacher")
    parser.add_argument("--seed", type=int, default=1, help="of every random choice; times differ from run to run all the same (default 1)")
    parser.add_argument("--only", default="", metavar="KIND,...|KIND/JOB", help="some kinds, or one job of one; see --list")
    parser.add_argument("--left", type=int, default=0, help="with one job: kills at most (default: --kills)")
    parser.add_argument("--out", type=Path, default=Path("build/chaos.json"), help="where the figures go (default build/chaos.json)")
    parser.add_argument("--folder", type=Path, default=Path("build/chaos"), help="where stores are made (default build/chaos)")
    parser.add_argument("--list", action="store_true", help="list the kinds and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
