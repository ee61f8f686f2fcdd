"""One job under test: its store, its input, its runs, and what is found in the end.

In: a Lab (folder, seed, an S3 server when one is needed) and what the job is to be. Out: runs in forked processes that
obey a plan of faults, and Findings. The store is made by headtail's own writers; it is looked at with `verify` alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from .events import Account, Follow, account
from .faults import WIDTH
from .spec import DONE, SLOWER, UNFORESEEN, Spec, start, start_making, warm
from .verify import Findings, Tree, check_files, check_rows

ANSWERED, FAILED = frozenset({"answered"}), frozenset({"failed"})
MOTO = Path(__file__).parent.parent / "moto_s3.py"
RUN_S = 60.0 * SLOWER  # a forked run takes below a second; one that takes this long hangs


class Lab:
    """Where jobs are made. Use as a context manager: the S3 server ends with it, and stores of jobs that held are removed."""

    def __init__(self, folder: Path, seed: int, engine: str = "null") -> None:
        self.folder, self.seed, self.engine = folder, seed, engine
        self.environment: dict[str, str] = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        self._server: subprocess.Popen[bytes] | None = None
        self.points: dict[bool, list[tuple[int, str]]] = {}  # by whether on S3: every commit of a job, and each moment of it
        self.hit: dict[bool, set[tuple[int, str]]] = {False: set(), True: set()}
        self.left_behind: list[str] = []  # processes of clusters that did not go by themselves
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Lab:
        warm()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def s3(self) -> None:
        """Start moto's server, which stands in for S3, unless it runs."""
        if self._server is not None:
            return
        port = free_port()
        self.environment |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
        }
        self._server = subprocess.Popen([sys.executable, str(MOTO), str(port), str(os.getpid())], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 30 * SLOWER
        while not answers(port):
            assert self._server.poll() is None, "moto's server did not start"
            assert time.monotonic() < end, "moto's server did not answer within 30 s"
            time.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as made:
        return made.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Run:
    """A run in a forked process, until it ended and after."""

    def __init__(self, process: BaseProcess, said: Path, what: str) -> None:
        self.process, self.pid, self._said, self.what = process, process.pid or 0, said, what

    def __str__(self) -> str:
        return f"{self.what} -> {'still runs' if self.alive else self.code}"

    @property
    def alive(self) -> bool:
        return self.process.exitcode is None

    @property
    def code(self) -> int:
        return int(self.process.exitcode or 0)

    @property
    def said(self) -> str:
        return self._said.read_text(encoding="utf-8") if self._said.exists() else ""

    def wait(self, seconds: float | None) -> None:
        self.process.join(seconds)


@dataclass
class Bench:
    """One job. `name` is its kind and number; `expected` holds the states each query may end in; `fields` is the job's config."""

    lab: Lab
    name: str
    s3: bool = False
    root: str = ""
    expected: dict[str, frozenset[str]] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)
    echo: bool = True
    found: Findings = field(default_factory=Findings)
    runs: list[Run] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    left: int = 0  # kills that it was allowed
    survived: list[float] = field(default_factory=list)  # share of the finished rows that were safe, per kill that was looked at
    checked: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.lab.seed}/{self.name}")
        self.folder = self.lab.folder / self.name.replace("/", "-")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.s3:
            self.lab.s3()
        self.root = self.root or (f"s3://{self.name.replace('/', '-').replace('_', '-')}/store" if self.s3 else str(self.folder / "store"))
        self.log = Follow(self.folder / "events")
        self._runs = 0

    @property
    def number(self) -> int:
        return int(self.name.rpartition("/")[2])

    @property
    def store(self) -> str:
        return "s3" if self.s3 else "disk"

    # --- its input

    def make(
        self,
        expected: Mapping[str, frozenset[str]],
        *,
        flush_rows: int = 20,
        shards: int = 2,
        delay_us: int = 200,
        model: Mapping[str, Any] | None = None,
    ) -> None:
        """The store with a finished plan of these queries, and the job's config. `model`: instead of the null engine."""
        self.expected = dict(expected)
        made = start_making(self.root, list(expected), self.lab.environment)
        made.join(RUN_S)
        if made.exitcode != 0:
            raise RuntimeError(f"the input of {self.name} could not be made: exit code {made.exitcode}")
        null = {"engine": "null", "model": f"null:faults,delay_us={delay_us}", "cpus": 0.5}
        self.fields = {
            "root": self.root,
            "tracking": {"enabled": False},
            "inputs": ["plan:head"],
            "model": dict(model or null),
            "shards": shards,
            "flush_rows": flush_rows,
            "flush_seconds": 600.0,  # by rows alone, so that a job has the same commits each time
        }

    def rows(self, count: int) -> dict[str, frozenset[str]]:
        """`count` queries that are all to be answered."""
        return {f"query {i} of {self.name}": ANSWERED for i in range(count)}

    # --- its runs

    def plan(self, at: Mapping[int, str] | None = None) -> Path:
        """A plan file: what is to happen at which commit of the next run, or of all processes that get this plan."""
        self._runs += 1
        path = self.folder / f"plan-{self._runs}.json"
        text = {"events": str(self.log.path), "commits": str(path.with_suffix(".commits")), "at": dict(at or {})}
        path.write_text(json.dumps({**text, "pace": self.pace, "seed": f"{self.lab.seed}/{self.name}"}))
        return path

    def commits(self) -> list[str]:
        """The commits of the last run: process, operation and path of each."""
        path = self.folder / f"plan-{self._runs}.commits"
        data = path.read_bytes() if path.exists() else b""
        return [data[i : i + WIDTH].decode().rstrip() for i in range(0, len(data), WIDTH)]

    def begin(self, at: Mapping[int, str] | None = None, run: str = "", more: Mapping[str, str] | None = None) -> Run:
        """A run started in a forked process. The same `run` as before: as if Ray had brought the worker back."""
        plan = self.plan(at)
        said = self.folder / f"said-{self._runs}"
        spec = Spec(self.fields, str(plan), str(said), run or f"run{self._runs:04}", {**self.lab.environment, **(more or {})})
        begun = Run(start(spec), said, f"run {self._runs}{f' with {dict(at)}' if at else ''}")
        self.runs.append(begun)
        return begun

    def end(self, run: Run, timeout: float = RUN_S, expected: Sequence[int] = ()) -> int:
        """Its exit code. One that hangs is killed and told as a problem, and so is a stack trace unless it is `expected`."""
        run.wait(timeout)
        if run.alive:
            self.fault(f"{run} did not end within {timeout:g} s")
            run.process.kill()
            run.wait(None)
        if run.code in (UNFORESEEN, 1) and run.code not in expected:
            self.fault(f"{run}: a stack trace, not an error that says what to do: ...{run.said[-600:]}")
        return run.code

    def go(self, at: Mapping[int, str] | None = None, run: str = "", more: Mapping[str, str] | None = None) -> int:
        """A run from start to end; its exit code."""
        return self.end(self.begin(at, run, more))

    @property
    def said(self) -> str:
        """What the last run said when it failed."""
        return self.runs[-1].said

    def kill(self, run: Run, what: str) -> None:
        """SIGKILL to a run, unless it has ended; written into the log first."""
        if run.alive:
            self.note_kill(run.pid, what)
            run.process.kill()
            run.wait(None)

    def note_kill(self, pid: int, what: str, kind: str = "k", at: float = 0.0) -> None:
        with self.log.path.open("a", encoding="utf-8") as file:
            file.write(f"{at or time.time():.6f} {pid} {kind} {what}\n")

    def resume(self, most: int = 6) -> None:
        """Runs without faults until one ends well: the first should, unless a fault outlives its run."""
        codes = []
        for _ in range(most):
            codes.append(self.go())
            if codes[-1] == DONE:
                return
        self.fault(f"{most} runs without faults ended with {codes}: {self.said[-400:]}")

    # --- what is found

    def fault(self, what: str) -> None:
        """Something that is wrong besides rows and files."""
        self.found.wrong += 1
        self.found.say(what)

    def tree(self) -> Tree:
        return Tree(self.root, self.lab.environment)

    def look(self, when: str) -> None:
        """After a kill: every file that a resumed job would read is whole."""
        before = self.found.unreadable
        check_files(self.tree(), self.found)
        if self.found.unreadable > before:
            self.found.say(f"... found after {when}")

    def safe(self) -> int:
        """Rows of the segments that journals name."""
        tree = self.tree()
        journals = [json.loads(tree.read(name)) for name in tree.names("precompute") if name.endswith("/journal.json")]
        return sum(ref["rows"] for journal in journals for ref in journal["segments"])

    def check(self) -> Findings:
        """In the end: rows, files, and that running once more asks nothing and changes nothing. Done once."""
        if self.checked:
            return self.found
        self.checked = True
        tree = self.tree()
        check_files(tree, self.found)
        check_rows(tree, self.expected, self.found, self.echo)
        before, asked = tree.digests(), self.log.count("a")
        if (code := self.go()) != DONE:
            self.fault(f"a run after success ended with {code}: {self.said[-400:]}")
        after, again = tree.digests(), self.log.count("a") - asked
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed or again:
            self.found.changed += len(changed) + again
            self.found.say(f"a run after success asked {again} rows and changed {', '.join(changed[:5]) or 'no file'}")
        return self.found

    def account(self) -> Account:
        return account(self.log.read())

    def remove(self) -> None:
        """Nothing of a job that held is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
