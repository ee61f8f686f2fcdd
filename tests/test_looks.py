"""Looking is spending: whoever reads human labels is in the ledger, sealed rows stay sealed, and a bad candidate rarely passes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from bench import looks
from bench.looks import POLICY
from conftest import keep
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.cli import main
from headtail.core.errors import ConfigError, GateRejected
from headtail.core.evidence import Evidence
from headtail.core.keys import query_key
from headtail.core.rows import HUMAN_LABELS, KEY
from headtail.core.task import Task, load_task
from headtail.releases import release
from headtail.releases.look import LEDGER, read_look_log, record_look
from headtail.releases.promotion import promote_release
from headtail.releases.proof import recheck
from headtail.releases.seal import open_labels, seal_labels, sealed_keys
from headtail.stages import gate
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from test_cache import answers, good, publish
from test_gate import GOOD, OFF, POOR, TEACHER, evidence_of, put, run_gate, with_policy

pytestmark = pytest.mark.usefixtures("not_drawn")

LABELS = "plan/" + "p" * 16 + ":human_labels"


def scored(queries: str, given: str = "g") -> pa.Table:
    keys = pa.array([query_key(q) for q in queries], KEY)
    return pa.table({"query_key": keys, "wanted": ["w"] * len(queries), "given": [given] * len(queries)})


def number(store: Storage, rows: pa.Table, source: str = "s", task: str = "t", policy: str = "p") -> int:
    return record_look(store, "evaluate", task, policy, {source: rows})[source]


def test_a_look_is_known_by_its_rows_and_answers_whatever_things_are_called(store: Storage) -> None:
    assert number(store, scored("abc")) == 1
    assert number(store, scored("abc"), source="other", task="another") == 1  # the same answers on the same rows
    assert number(store, scored("cba")) == 1  # in whatever order
    assert number(store, scored("abc", "h"), source="new") == 2
    assert number(store, scored("xyz")) == 1  # other rows
    assert number(store, scored("cde")) == 3  # one row is shared with the first two
    assert number(store, scored("abc"), policy="q") == 4  # the same again, under a policy that was changed after the look
    assert number(store, scored("abc", "h")) == 2
    assert len(read_look_log(store)) == 5


def bound(value: float, gates: int) -> bool:
    """Whether so many false passes may be chance, were each at most delta."""
    return bool(stats.binomtest(round(value * gates), gates, POLICY.delta, alternative="greater").pvalue > 1e-4)


SIMULATED: dict[str, tuple[Callable[[int, np.random.Generator], dict[str, float]], int]] = {
    "best_of_20": (looks.best_of_20, 20),
    "adaptive": (partial(looks.adaptive, looks=6), 16),
    "renamed": (partial(looks.renamed, students=8), 16),
    "repeated": (looks.repeated, 16),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_a_bad_candidate_passes_at_most_as_often_as_delta(name: str) -> None:
    """Labels that the package seals, looks that it writes down, claims that it tests: each gate in a store of its own. `make
    simulate-statistics` has more of them."""
    attack, gates = SIMULATED[name]
    found = attack(gates, np.random.default_rng(3))
    assert bound(found[f"gate_false_pass_{name}"], gates)
    assert bound(found.get("without_seal", 0.0), gates)
    assert name not in ("best_of_20", "adaptive") or not bound(found["at_delta"], gates)  # the obvious gate lets more pass


def test_the_simulation_sees_a_broken_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were sealed rows open, or read by all, who knows the open rows by heart would pass."""
    monkeypatch.setattr("headtail.releases.seal.sealed_keys", lambda store: set())
    assert looks.adaptive(4, np.random.default_rng(3), looks=2)["gate_false_pass_adaptive"] == 1.0


def test_the_simulation_sees_a_broken_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were each look the first, one of many students would pass."""
    monkeypatch.setattr("headtail.releases.proof.record_gate", lambda *some: 1)
    monkeypatch.setattr("bench.looks.POLICY", POLICY.model_copy(update={"delta": 0.2}))  # the fault shows in fewer gates
    assert looks.renamed(12, np.random.default_rng(3), students=10)["gate_false_pass_renamed"] > 0.35


@pytest.mark.parametrize("attack, gates", [(looks.climbed, 400), (looks.promises, 300)], ids=["climbed", "promises"])
def test_levels_are_what_keeps_promises_and_what_shown_bounds_would_break(
    attack: Callable[[int, np.random.Generator], dict[str, float]], gates: int
) -> None:
    found = attack(gates, np.random.default_rng(3))
    assert bound(found.get("false_promise_of_20", 0.0), gates)
    assert not bound(found.get("at_delta", 1.0), gates)
    assert not bound(found.get("with_bounds", 1.0), gates)  # why bounds do not come out of rejections


def test_sealed_rows_are_read_by_the_gate_alone(store: Storage, intent: Task) -> None:
    put(store, intent, seal=0.5)
    sealed = sealed_keys(store)
    assert 300 < len(sealed) < 450
    rows = output_table(store, load_receipt(store, "evaluate"), "rows")
    assert not sealed & set(rows["query_key"].to_pylist())
    assert any("are sealed" in note for note in load_receipt(store, "evaluate").notes)
    receipt = run_gate(store)
    found = evidence_of(receipt)
    assert (found.sealed, found.look, found.candidates, receipt.rows["human_labels"]) == (True, 1, 2, len(sealed))
    assert found.passed
    assert recheck(store, found, with_policy(intent)) == []
    for criterion in found.criteria:  # of a pass: the bounds, and nothing else of the sealed rows
        assert (criterion.value, criterion.right, criterion.p) == (None, None, None)
        assert criterion.lower_bound is not None
        assert criterion.lower_bound >= criterion.threshold
        assert "sealed labels" in criterion.words()


def test_of_a_rejection_only_the_verdict_comes_out(store: Storage, intent: Task) -> None:
    put(store, intent, POOR, seal=0.5)
    receipt = run_gate(store)
    found = evidence_of(receipt)
    assert not found.passed
    tail = found.criteria[0]
    assert not tail.passed
    assert {(c.value, c.right, c.p, c.lower_bound) for c in found.criteria} == {(None, None, None, None)}
    assert tail.open_value == pytest.approx(205 / 240, abs=0.06)
    assert found.missing()[0].startswith("tail: not shown on ")
    stored = json.loads(store.read(receipt.output("verdict").path))
    assert stored["criteria"][0]["lower_bound"] is None
    assert not any(name.startswith(("p/", "value/", "lower_bound/")) for name in receipt.metrics)


def test_a_row_that_was_looked_at_cannot_be_sealed(store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"query_key": query_key(str(i)), "query": str(i), "answer": "{}", "count": 1, "stratum": "tail"} for i in range(200)]
    table = pa.Table.from_pylist(rows, HUMAN_LABELS)
    keep(store, "plan", "p" * 16, {"human_labels": table})
    half = table.slice(0, 100)
    record_look(store, "evaluate", "t", "p", {"s": half.append_column("wanted", half["answer"]).append_column("given", half["answer"])})
    main(["labels", "seal", "--root", store.root, "--share", "0.4", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["labels"], told["sealed"] > 20, told["seen_before"] > 20) == (200, True, True)
    assert not sealed_keys(store) & set(half["query_key"].to_pylist())
    assert open_labels(store, table).num_rows == 200 - told["sealed"]
    assert seal_labels(store, LABELS, table, 0.4)[0] == told["sealed"]  # again: nothing new


# ---- policy before results


LOOSE: dict[str, Any] = {"minimum": {}, "max_drop": 1, "delta": 0.49}


@pytest.mark.parametrize("seal", [0.5, 0.0])
def test_a_policy_is_not_loosened_after_a_rejection(store: Storage, tmp_path: Path, intent: Task, seal: float) -> None:
    """Neither in task.yaml, nor with it in the release: these rows hold the strictest policy that a gate saw them under."""
    elsewhere = open_storage(str(tmp_path / "elsewhere"))
    put(elsewhere, intent, POOR, seal=seal)
    loose = evidence_of(run_gate(elsewhere, **LOOSE))
    assert loose.passed  # where no gate saw the rows before: a policy of that task, written before its results
    put(store, intent, POOR, seal=seal)
    assert not evidence_of(run_gate(store)).passed
    log = read_look_log(store)
    with pytest.raises(GateRejected, match="under a stricter policy: minimum, max_drop, delta"):
        run_gate(store, **LOOSE)
    assert read_look_log(store) == log  # what is refused spends nothing
    task, (_, manifest) = with_policy(intent, **LOOSE), publish(store, tmp_path, answers(good("a", '{"intent":"price"}')))
    evidence = release.ReleaseEvidence(gates=(loose,))
    made = release.make_release(store, snapshot=manifest.id, task=task, evidence=evidence)
    with pytest.raises(GateRejected, match=r"a gate saw some of these labelled rows on .* under a stricter policy"):
        promote_release(store, made.id)
    other = load_task("query_intent")
    other = dataclasses.replace(
        other, file=other.file.model_copy(update={"gate": with_policy(intent).file.gate, "fallback": {"intent": "price"}})
    )
    with pytest.raises(GateRejected, match="score of the task, or fallback"):
        gate.run(gate.Config(root=store.root, tracking=OFF, task="query_intent"), task=other)
    stricter = evidence_of(run_gate(store, max_drop=0.01))
    assert not stricter.passed
    (found,) = recheck(store, loose, with_policy(intent))
    assert found.startswith("the policy of task query_intent (gate in task.yaml) is ")


def test_evidence_of_before_a_stricter_policy_still_holds(store: Storage, intent: Task) -> None:
    put(store, intent, seal=0.5)
    found = evidence_of(run_gate(store))
    assert evidence_of(run_gate(store, max_drop=0.049)).look == 2
    assert recheck(store, found, with_policy(intent)) == []


def test_a_policy_is_no_field_of_the_gates_config() -> None:
    with pytest.raises(ConfigError, match="max_drop"):
        main_config(max_drop=1)


def main_config(**fields: Any) -> None:
    from headtail.core.config import build_config

    build_config(gate.Config, fields, "test")


def test_evidence_is_computed_anew(store: Storage, intent: Task) -> None:
    """A forged verdict, whose figures are whole, does not survive: answers and labels are read again."""
    put(store, intent, POOR)
    rejected = evidence_of(run_gate(store))
    better = {"passed": True, "lower_bound": 0.95, "p": 1e-9, "value": 0.97}
    forged = Evidence.model_validate(
        {**rejected.model_dump(), "passed": True, "criteria": [{**c.model_dump(), **better} for c in rejected.criteria]}
    )
    assert forged.missing() == []
    found = recheck(store, forged, with_policy(intent))
    assert found
    assert found[0].startswith("computed anew, not shown: tail: ")
    gone = forged.model_copy(update={"answers": "precompute/none"})
    assert "cannot be computed anew" in recheck(store, gone, with_policy(intent))[0]
    lent = forged.model_copy(update={"candidate": "distill/" + "x" * 16, "digest": "X"})
    assert "are not those of distill/" + "x" * 16 in recheck(store, lent, with_policy(intent))[0]
    assert "are not those of" in recheck(store, lent.model_copy(update={"digest": "D"}), with_policy(intent))[0]
    other = forged.model_copy(update={"data": {**forged.data, "rows": "0" * 64}})
    assert "not those of the store" in recheck(store, other, with_policy(intent))[0]


def test_a_ledger_outside_of_the_root_knows_looks_of_other_roots(tmp_path: Path, intent: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same labels in a fresh root are sealed as they were, and the next gate is the next look."""
    monkeypatch.setenv(LEDGER, str(tmp_path / "ledger"))
    first, second, alone = (open_storage(str(tmp_path / name)) for name in ("first", "second", "alone"))
    put(first, intent, POOR, seal=0.5)
    assert evidence_of(run_gate(first)).look == 1
    put(second, intent)
    assert sealed_keys(second) == sealed_keys(first)
    found = evidence_of(run_gate(second))
    assert (found.look, found.sealed, found.passed, len(found.ledger)) == (2, True, True, 64)
    assert recheck(second, found, with_policy(intent)) == []
    with pytest.raises(GateRejected, match="under a stricter policy"):
        run_gate(second, **LOOSE)
    assert not (tmp_path / "first" / "looks").exists()
    monkeypatch.delenv(LEDGER)
    (what,) = recheck(second, found, with_policy(intent))
    assert what.startswith("its looks were counted in another ledger")
    put(alone, intent, seal=0.5)
    own = evidence_of(run_gate(alone))
    assert (own.look, own.ledger) == (1, "")
    monkeypatch.setenv(LEDGER, str(tmp_path / "ledger"))
    (what,) = recheck(alone, own, with_policy(intent))
    assert what.startswith("its looks were counted in another ledger")


def test_planned_looks_are_spent(store: Storage, intent: Task) -> None:
    put(store, intent, seal=0.5)
    assert evidence_of(run_gate(store, looks=2)).candidates == 2
    put(store, intent, POOR, student="u" * 16)
    assert evidence_of(run_gate(store, looks=2)).look == 2
    put(store, intent, {**POOR, "head": (200, 190, 200)}, student="v" * 16)
    with pytest.raises(GateRejected, match="look 3 at these labelled rows: the policy plans 2"):
        run_gate(store, looks=2)


def test_few_labels_do_not_pass(store: Storage, intent: Task) -> None:
    put(store, intent)
    found = evidence_of(run_gate(store, least_labels=200))
    assert not found.passed
    assert found.missing() == ["unseen: 160 labels, the policy asks for at least 200"]


# ---- the teacher in a claim, the candidate's own training rows


def test_a_teacher_that_is_none_is_refused(store: Storage, intent: Task) -> None:
    put(store, intent)
    same = load_receipt(store, "precompute", f"precompute/{TEACHER}", PrecomputeResult)
    tables = {name: output_table(store, same, name) for name in same.outputs}
    model = same.result.model.model_copy(update={"digest": "D"})
    fields = {"task_fingerprint": intent.fingerprint, "result": same.result.model_copy(update={"model": model})}
    keep(store, "precompute", TEACHER, tables, **fields)
    with pytest.raises(ConfigError, match="teacher is the candidate itself"):
        run_gate(store)
    (name,) = tables
    keep(store, "precompute", TEACHER, {name: tables[name].slice(3)}, task_fingerprint=intent.fingerprint, result=same.result)
    with pytest.raises(ConfigError, match="teacher was not asked on 3 of the 750 rows"):
        run_gate(store)


def test_rows_that_the_candidate_learnt_from_are_left_out(store: Storage, intent: Task) -> None:
    put(store, intent)
    labels = output_table(store, load_receipt(store, "plan"), "human_labels")
    keep(store, "curate", "c" * 16, {"training_set": labels.filter(pa.compute.equal(labels["stratum"], "head"))})
    learnt = DistillResult(digest="D", trained_on=("curate/" + "c" * 16 + ":training_set",))
    keep(store, "distill", "d" * 16, {}, result=learnt)
    receipt = run_gate(store)
    assert (evidence_of(receipt).excluded, receipt.rows["human_labels"]) == (200, 750 - GOOD["head"][0])
    assert any("200 labelled rows are left out" in note for note in receipt.notes)


def test_a_release_under_another_policy_is_not_promoted(store: Storage, tmp_path: Path, intent: Task) -> None:
    put(store, intent)
    found = evidence_of(run_gate(store, max_drop=0.2))
    assert found.passed
    task, (_, manifest) = with_policy(intent), publish(store, tmp_path, answers(good("a", '{"intent":"price"}')))
    made = release.make_release(store, snapshot=manifest.id, task=task, evidence=release.ReleaseEvidence(gates=(found,)))
    with pytest.raises(GateRejected, match="is not promoted: the policy of task query_intent"):
        promote_release(store, made.id)
    own = evidence_of(run_gate(store))
    made = release.make_release(store, snapshot=manifest.id, task=task, evidence=release.ReleaseEvidence(gates=(own,)))
    assert promote_release(store, made.id).id == made.id
