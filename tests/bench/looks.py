"""How often a gate lets a bad candidate pass, whatever is done with human labels in between: by simulation.

Every student here is exactly as good as the threshold, so that each pass is false. Each simulated gate has a store of its own, with labels
that the package's own code seals, looks that it writes down, and claims that it reads, scores and tests: a fault in seals or in the ledger
shows here. Beside each figure: what the obvious gate does, which tests at delta each time, on whatever rows there are.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headtail.adapters.storage import Storage, open_storage, write_json, write_table
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.core.bounds import share_p
from headtail.core.keys import canonical, query_key
from headtail.core.policy import TaskPolicy
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS
from headtail.core.task import Task, load_task
from headtail.core.threshold import LabelledRows, choose_threshold
from headtail.releases.claim import read_claim
from headtail.releases.look import record_look
from headtail.releases.proof import prove_claim
from headtail.releases.seal import open_labels, seal_labels
from headtail.stages.precompute.result import AnsweringModel
from headtail.stages.precompute.result import Result as PrecomputeResult

THRESHOLD, ROWS, STUDENTS = 0.85, 160, 20
POLICY = TaskPolicy(minimum={"all": THRESHOLD}, max_drop=None, above_fallback=False, delta=0.05)
RIGHT, WRONG = canonical({"intent": "price"}), canonical({"intent": "how_to"})
LINE = "amber birch cedar dune ember fjord glade heath inlet jetty knoll ledge marsh notch ochre pond"
WORDS = LINE.split()
QUERIES = [f"{WORDS[i % 16]} {WORDS[i // 16 % 16]} {WORDS[(7 * i + i // 16) % 16]} {i}" for i in range(ROWS)]
Bools = npt.NDArray[np.bool_]


def keep(store: Storage, stage: str, mark: str, tables: Mapping[str, pa.Table], **fields: Any) -> str:
    """A receipt as the stage itself would leave it; returns its folder."""
    path = f"{stage}/{mark}"
    outputs = {name: write_table(store, f"{path}/{name}.parquet", table) for name, table in tables.items()}
    made = Receipt(
        stage=stage, fingerprint=mark * 2, path=path, started="2030-01-01T00:00:00+00:00", seconds=1.0, outputs=outputs, **fields
    )
    write_json(store, f"{path}/receipt.json", made.model_dump(mode="json"))
    return path


class Team:
    """Labels in a store, and who evaluates and gates students on them. A student is the labels on which it is right."""

    def __init__(self, store: Storage) -> None:
        self.store, self.students = store, 0
        task = load_task("query_intent")
        self.task = dataclasses.replace(task, file=task.file.model_copy(update={"gate": POLICY}))
        self.labels, self.table = "", HUMAN_LABELS.empty_table()

    def label(self, rows: int, seal: float = 0.0) -> None:
        """People label the first `rows` queries, and seal a share of the labels."""
        some = [{"query_key": query_key(q), "query": q, "answer": RIGHT, "count": 1, "stratum": "tail"} for q in QUERIES[:rows]]
        self.labels = keep(self.store, "plan", f"{rows:016}", {"human_labels": pa.Table.from_pylist(some, HUMAN_LABELS)}) + ":human_labels"
        self.table = output_table(self.store, *load_ref(self.store, self.labels))
        if seal:
            seal_labels(self.store, self.labels, self.table, seal)

    @property
    def open_rows(self) -> Bools:
        """Which labels are open: all that an evaluation reads."""
        return np.isin(self.table["query"].to_pylist(), open_labels(self.store, self.table)["query"].to_pylist())

    def evaluate(self, students: Bools) -> npt.NDArray[np.int64]:
        """Right answers of each student on the open rows, which are looks."""
        seen = self.open_rows
        rows = {f"student_{number}": self._scored(right, seen) for number, right in enumerate(students)}
        record_look(self.store, "evaluate", self.task.name, self.task.policy_digest, rows)
        return np.asarray(students[:, seen].sum(-1))

    def _scored(self, right: Bools, seen: Bools) -> pa.Table:
        given = np.where(right, RIGHT, WRONG)[seen].tolist()
        return pa.table({"query_key": self.table["query_key"].filter(pa.array(seen)), "wanted": [RIGHT] * len(given), "given": given})

    def gate(self, right: Bools, task: Task | None = None, source: str = "batch_student") -> bool:
        """Whether the gate lets a student pass."""
        task, self.students = task or self.task, self.students + 1
        mark = f"{self.students:016}"
        lines = [
            {"query_key": key, "query": query, "answer_key": query_key(mark + query), "state": "answered", "stratum": "tail", "count": 1}
            | {"answer": RIGHT if ok else WRONG, "confidence": 0.9, "source": source}
            for key, query, ok in zip(self.table["query_key"].to_pylist(), self.table["query"].to_pylist(), right, strict=True)
        ]
        answers = pa.Table.from_pylist(sorted(lines, key=lambda line: bytes(line["query_key"])), schema=ANSWER)
        result = PrecomputeResult(source=source, model=AnsweringModel(name=f"model_{mark}", digest=mark))
        path = keep(self.store, "precompute", mark, {"answers/shard-00000": answers}, task_fingerprint=task.fingerprint, result=result)
        claim = read_claim(self.store, task, self.labels, source, {source: path})
        verdict = prove_claim(self.store, task, claim, source, path, self.labels)
        return all(criterion.passed for criterion in verdict.criteria)


@contextmanager
def teams(rows: int, seal: float) -> Iterator[Iterator[Team]]:
    """Teams that begin with the same labels, sealed once, each in a fresh store."""
    with tempfile.TemporaryDirectory() as folder:
        first = Team(open_storage(f"{folder}/first"))
        first.label(rows, seal)

        def copies() -> Iterator[Team]:
            while True:
                shutil.copytree(f"{folder}/first", f"{folder}/next")
                team = Team(open_storage(f"{folder}/next"))
                team.labels, team.table = first.labels, first.table
                yield team
                shutil.rmtree(Path(folder) / "next")

        yield copies()


def passes(right: npt.ArrayLike, rows: npt.ArrayLike, level: float | npt.NDArray[np.float64]) -> Bools:
    """Whether the exact test of one share lets them pass: the obvious gate's."""
    return np.asarray(share_p(right, rows, THRESHOLD) <= level)


def draw(rng: np.random.Generator, *shape: int) -> Bools:
    """Students that are exactly as good as the threshold."""
    return np.asarray(rng.random(shape) < THRESHOLD)


def best_of_20(gates: int, rng: np.random.Generator) -> dict[str, float]:
    """20 students are evaluated on the open rows; the best of them is gated. `without_seal`: all rows are open."""
    found = dict.fromkeys(("gate_false_pass_best_of_20", "without_seal", "at_delta"), 0.0)
    for name, seal in (("gate_false_pass_best_of_20", 0.5), ("without_seal", 0.0)):
        with teams(ROWS, seal) as several:
            for _, team in zip(range(gates), several, strict=False):
                students = draw(rng, STUDENTS, ROWS)
                right = team.evaluate(students)
                found[name] += team.gate(students[right.argmax()]) / gates
                if not seal:
                    found["at_delta"] += bool(passes(right.max(), ROWS, POLICY.delta)) / gates
    return found


def adaptive(gates: int, rng: np.random.Generator, looks: int = STUDENTS) -> dict[str, float]:
    """A student that knows the open rows by heart is evaluated and gated, and changed after each rejection, until it passes."""
    found = {"gate_false_pass_adaptive": 0.0, "at_delta": 0.0}
    with teams(ROWS, 0.5) as several:
        for _, team in zip(range(gates), several, strict=False):
            right, seen = draw(rng, ROWS), team.open_rows
            for _ in range(looks):
                right = np.where(seen, True, right)
                if team.gate(right):
                    found["gate_false_pass_adaptive"] += 1 / gates
                    break
                right = np.where(rng.random(ROWS) < 0.1, draw(rng, ROWS), right)
            known = int(right[seen].sum())
            found["at_delta"] += bool(passes(known, int(seen.sum()), POLICY.delta)) / gates
    return found


def renamed(gates: int, rng: np.random.Generator, students: int = STUDENTS) -> dict[str, float]:
    """Students are gated on the same rows, each as another answer source of another task."""
    found = {"gate_false_pass_renamed": 0.0, "at_delta": 0.0}
    with teams(ROWS, 0.5) as several:
        for _, team in zip(range(gates), several, strict=False):
            drawn, sealed = draw(rng, students, ROWS), ~team.open_rows
            for number, right in enumerate(drawn):
                task = dataclasses.replace(team.task, file=team.task.file.model_copy(update={"name": f"task_{number}"}))
                if team.gate(right, task, f"source_{number}"):
                    found["gate_false_pass_renamed"] += 1 / gates
                    break
            found["at_delta"] += bool(passes(drawn[:, sealed].sum(-1), int(sealed.sum()), POLICY.delta).any()) / gates
    return found


def repeated(gates: int, rng: np.random.Generator, looks: int = 4) -> dict[str, float]:
    """One student is gated again after each further 40 labels, all of them open."""
    found, each = {"gate_false_pass_repeated": 0.0, "at_delta": 0.0}, ROWS // looks
    with teams(each, 0.0) as several:
        for _, team in zip(range(gates), several, strict=False):
            right = draw(rng, ROWS)
            rows = each * np.arange(1, looks + 1)
            for count in rows.tolist():
                team.label(count)
                if team.gate(right[:count]):
                    found["gate_false_pass_repeated"] += 1 / gates
                    break
            found["at_delta"] += bool(passes(right.cumsum()[rows - 1], rows, POLICY.delta).any()) / gates
    return found


def climbed(gates: int, rng: np.random.Generator, looks: int = 100) -> dict[str, float]:
    """Why bounds do not come out of rejections. By arithmetic alone, since the package never shows them: were they shown, each change of a
    student that raised its bound would be kept."""
    spent, rows = [POLICY.level(look) for look in range(1, looks + 1)], 500
    scores = draw(rng, gates, rows)
    passed = passes(scores.sum(-1), rows, spent[0])
    for level in spent[1:]:
        changed = np.where(rng.random((gates, rows)) < 0.05, draw(rng, gates, rows), scores)
        passed |= passes(changed.sum(-1), rows, level)
        scores = np.where((changed.sum(-1) > scores.sum(-1))[:, None], changed, scores)
    return {"with_bounds": float(passed.mean())}


def promises(gates: int, rng: np.random.Generator) -> dict[str, float]:
    """20 students, or settings, are calibrated on the same rows until one gets a threshold; above every threshold each of them is right a
    hair too seldom. `at_delta`: each at delta, as if the others were not there. Levels are the policy's: no store."""
    found, rows = {}, 500
    spent, false = [POLICY.level(look) for look in range(1, STUDENTS + 1)], np.zeros((gates, 2), dtype=bool)
    for gate in range(gates):
        first = rng.random(rows) < 0.5
        for level in spent:
            sure, right = rng.random(rows), rng.random(rows) < THRESHOLD - 1e-6
            halves = LabelledRows(sure[first], right[first]), LabelledRows(sure[~first], right[~first])
            for column, one in enumerate((level, POLICY.delta)):
                false[gate, column] |= choose_threshold(*halves, THRESHOLD, one).threshold is not None
    found["false_promise_of_20"], found["at_delta"] = false.mean(0).tolist()
    return found


ATTACKS = (best_of_20, adaptive, renamed, repeated, climbed, promises)
SIZES = {"adaptive": 200, "renamed": 200, "climbed": 2000, "promises": 2000}  # the first two gate 20 times each; the others open no store


def false_passes(gates: int = 400) -> Mapping[str, float]:
    """All of them, and a table."""
    found: dict[str, float] = {}
    for attack in ATTACKS:
        size = SIZES.get(attack.__name__, gates)
        figures = attack(size, np.random.default_rng(14))
        print(f"{attack.__name__:<12} {size:>6} gates  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
        found |= {name if name.startswith(("gate_", "false_")) else f"{attack.__name__}_{name}": value for name, value in figures.items()}
    return found


def gate_numbers() -> Mapping[str, float | None]:
    """The figures of tests/bench/numbers.py."""
    found = false_passes()
    return {name: found[name] for name in ("gate_false_pass_best_of_20", "gate_false_pass_adaptive", "gate_false_pass_renamed")}
