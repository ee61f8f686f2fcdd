"""Every kind of fault, how much of each, and the run through all of them.

In: how many kills, which kinds, a seed. Out: a Tally per kind. Kinds without a cluster run beside those with one, each in
the order below; a job's choices depend on the seed, its kind and its number alone. A failed job keeps its folder.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from . import clusters, kinds
from .bench import Bench, Lab

WRONGS = ("missing", "duplicated", "unreadable", "unasked", "wrong", "changed")  # what Findings counts
LIMIT_S = 60.0  # of the job, repeated per kill
Do = Callable[[Bench, int], None]


@dataclass(frozen=True)
class Kind:
    """One way to break a job. `share` of all kills; for kinds that kill nothing, faults in relation to all kills."""

    name: str
    do: Do
    share: float
    what: str
    cluster: bool = False
    kills: bool = True

    @property
    def s3(self) -> bool:
        return self.name.endswith(".s3")


def _aimed(aims: dict[str, clusters.Aim], name: str) -> Do:
    return partial(clusters.cluster, aim=aims[name])


NULL = (
    Kind("commit.disk", kinds.commit, 0.26, "SIGKILL before, inside and after every commit, each at least once"),
    Kind("commit.s3", kinds.commit, 0.14, "the same on S3"),
    Kind("timed.disk", kinds.timed, 0.10, "SIGKILL at random times"),
    Kind("timed.s3", kinds.timed, 0.03, "the same on S3"),
    Kind("short.disk", kinds.short, 0.01, "SIGKILL of jobs of a few seconds: 95 % of the finished rows survive in each"),
    Kind("twin.disk", kinds.twin, 0.05, "two drivers run one job at once and one is killed"),
    Kind("twin.s3", kinds.twin, 0.03, "the same on S3"),
    Kind("poison.disk", kinds.poison, 0.03, "a row that kills the engine each time"),
    Kind("hang.disk", kinds.hang, 0.02, "a row on which the engine hangs each time"),
    Kind("endpoint.disk", kinds.endpoint, 0.01, "an endpoint that answers 401, 429, 500, rubbish or nothing, and a kill"),
    Kind("again.disk", kinds.again, 0.05, "writes that are done and then fail once", kills=False),
    Kind("again.s3", kinds.again, 0.04, "puts that are done but whose reply is lost, so that it is put again", kills=False),
    Kind("later.s3", kinds.later, 0.04, "puts that S3 answers with 409, 429, 503 or a reset, and does not do", kills=False),
    Kind("full.disk", kinds.full, 0.05, "no space left while a chosen write goes on", kills=False),
    Kind("tmpfs.disk", kinds.full_disk, 0.02, "a small file system that is really full", kills=False),
    Kind("actor.disk", _aimed(clusters.AIMS, "actor"), 0.14, "SIGKILL of Ray's actors, two workers", cluster=True),
    Kind("actor.s3", _aimed(clusters.AIMS, "actor"), 0.05, "the same on S3", cluster=True),
    Kind("writer.disk", clusters.writer, 0.03, "SIGKILL at commits, in whichever process of a cluster makes them", cluster=True),
    Kind("writer.s3", clusters.writer, 0.01, "the same on S3", cluster=True),
    Kind("driver.disk", _aimed(clusters.AIMS, "driver"), 0.02, "SIGKILL of the driver; the next starts at once", cluster=True),
    Kind("driver.s3", _aimed(clusters.AIMS, "driver"), 0.01, "the same on S3", cluster=True),
    Kind("node.disk", _aimed(clusters.AIMS, "node"), 0.02, "one node of several taken away, or its raylet alone", cluster=True),
    Kind("raylet.disk", _aimed(clusters.AIMS, "raylet"), 0.015, "SIGKILL of the only raylet", cluster=True),
    Kind("mixed.disk", _aimed(clusters.AIMS, "mixed"), 0.01, "SIGKILL of an actor, then of the driver", cluster=True),
    Kind("gcs.disk", _aimed(clusters.AIMS, "gcs"), 0.005, "SIGKILL of Ray's GCS", cluster=True),
    Kind("rowkill.disk", clusters.poison, 0.01, "a row that kills its actor each time", cluster=True),
)
VLLM = (
    Kind("actor.disk", _aimed(clusters.VLLM_AIMS, "actor"), 0.35, "SIGKILL of the actor that runs vLLM", cluster=True),
    Kind("core.disk", _aimed(clusters.VLLM_AIMS, "core"), 0.35, "SIGKILL of vLLM's engine core, in a process of its own", cluster=True),
    Kind("driver.disk", _aimed(clusters.VLLM_AIMS, "driver"), 0.3, "SIGKILL of the driver", cluster=True),
)
ENGINES = {"null": NULL, "vllm": VLLM}


def cannot(kind: Kind) -> str:
    """Why a kind cannot be run here; empty when it can."""
    from headtail.engines import ModelConfig
    from headtail.engines.null import _WORDS
    from headtail.stages.precompute import Config

    if kind.name.startswith("core") and "engine_process" not in ModelConfig.model_fields:
        return "no field model.engine_process"
    if kind.name.startswith("hang") and not ("stall_seconds" in Config.model_fields and "!hang" in _WORDS):
        return "no field stall_seconds, or no !hang in the null engine"
    if kind.name.startswith("tmpfs") and os.geteuid() != 0:
        return "only root may mount a file system"
    return ""


@dataclass
class Tally:
    """What became of one kind."""

    kind: Kind
    budget: int
    kills: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    jobs: int = 0
    rows: int = 0
    redone_rows: int = 0
    lost: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    survived: list[float] = field(default_factory=list)
    wrongs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WRONGS, 0))
    failures: list[dict[str, object]] = field(default_factory=list)
    skipped: str = ""

    @property
    def struck(self) -> int:
        return self.kills if self.kind.kills else sum(self.faults.values())

    @property
    def bad(self) -> bool:
        return any(self.wrongs.values()) or bool(self.failures) or max(self.lost, default=0.0) > LIMIT_S

    def add(self, bench: Bench) -> None:
        """One job that has ended."""
        found, account = bench.check(), bench.account()
        self.jobs += 1
        self.rows += found.rows
        self.kills += bench.log.count("k")
        for name, count in {**bench.faults, "failed writes": bench.log.count("f")}.items():
            if count:
                self.faults[name] = self.faults.get(name, 0) + count
        self.redone_rows += account.rows
        self.lost += account.lost
        self.survived += bench.survived
        self.idle += [seconds for seconds in account.idle if seconds]
        for name in WRONGS:
            self.wrongs[name] += getattr(found, name)
        if found.bad or max(account.lost, default=0.0) > LIMIT_S:
            lab = bench.lab
            self.failures.append(
                {
                    "job": bench.name,
                    "problems": [*found.problems, f"at most {max(account.lost, default=0.0):.1f} s repeated for one kill"],
                    "steps": [str(run) for run in bench.runs],
                    "kept": str(bench.folder),
                    "reproduce": f"python -m tests.chaos --engine {lab.engine} --seed {lab.seed} --only {bench.name} --left {bench.left}",
                }
            )
        else:
            bench.remove()


class Harness:
    """One run through `chosen` kinds. `told` is called with each Tally as it changes."""

    def __init__(self, lab: Lab, chosen: Sequence[Kind], kills: int, told: Callable[[Tally], None]) -> None:
        self.lab, self.told, self.kills = lab, told, kills
        scale = sum(kind.share for kind in chosen if kind.kills and not cannot(kind)) or sum(kind.share for kind in chosen) or 1.0
        each = kills / scale
        self.tallies = [
            Tally(kind, 0 if cannot(kind) else max(1, math.ceil(kind.share * each - 1e-9)), skipped=cannot(kind)) for kind in chosen
        ]
        self.total = sum(tally.budget for tally in self.tallies)
        self._stop = threading.Event()

    def run(self, job: int | None = None, left: int = 0) -> list[Tally]:
        """All of it; with `job`, that one job of each kind alone, with at most `left` kills."""
        lanes = [[tally for tally in self.tallies if tally.kind.cluster is lane and not tally.skipped] for lane in (False, True)]
        with ThreadPoolExecutor(len(lanes)) as pool:
            ends = [pool.submit(self._lane, lane, job, left) for lane in lanes]
            try:
                for end in ends:
                    end.result()
            except BaseException:
                self._stop.set()
                raise
        killers = [tally for tally in self.tallies if tally.kind.kills and not tally.skipped]
        if job is None and killers and (short := self.kills - sum(tally.kills for tally in self.tallies)) > 0:
            killers[0].budget = killers[0].kills + short  # some jobs end before they are killed: the first kind makes up for it
            self._lane(killers[:1], None, 0)
        return self.tallies

    def _lane(self, tallies: Sequence[Tally], job: int | None, left: int) -> None:
        for tally in tallies:
            number = tally.jobs if job is None else job
            while not self._stop.is_set() and (self._more(tally) if job is None else not tally.jobs):
                self._one(tally, number, left or max(1, tally.budget - tally.struck))
                number += 1

    def _more(self, tally: Tally) -> bool:
        """Until the budget is spent, and where it suffices to meet every commit point, until each was met."""
        every = self.lab.points.get(tally.kind.s3, [])
        missed = tally.kind.do is kinds.commit and tally.budget >= len(every) > tally.jobs  # job i dies at point i
        return tally.struck < tally.budget or missed

    def _one(self, tally: Tally, number: int, left: int) -> None:
        bench = Bench(self.lab, f"{tally.kind.name}/{number}", s3=tally.kind.s3, left=left)
        tally.kind.do(bench, left)
        tally.add(bench)
        self.told(tally)
