"""The side-input gap: rows without side inputs say nothing of it, verdicts follow from paired intervals, two stages close it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from conftest import answered_by, keep
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, InputError
from headtail.core.io_format import IOFormat
from headtail.core.keys import answer_key, query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS, SCORED, TRAINING_SET, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.engines import ModelConfig
from headtail.stages import distill, evaluate, precompute
from headtail.stages.distill.base import BaseModelConfig, Shape
from headtail.stages.distill.encoder import Settings
from headtail.stages.evaluate.scoring import Sureness
from headtail.stages.precompute.dry_run.changes import Change
from headtail.stages.precompute.dry_run.preview import preview
from headtail.studies import gap
from null_jobs import MakeJob, planned, rows_of, run_here
from test_dry_run import groups
from test_precompute import config as precompute_config
from test_precompute import plan as make_plan

OFF = TrackingConfig(enabled=False)
PLAN = "p" * 16
SIDED, ROWS = 70, 120  # labelled rows that have side inputs, and all: 60 head, 30 torso (of which 10 have any), 30 tail


# --- asking without side inputs


def test_rows_asked_without_side_inputs_are_asked_as_the_tail_is(make_local_job: MakeJob, segmentation: Task) -> None:
    table = planned([f"q{i}" for i in range(90)])  # every third row has businesses
    run_here(make_local_job(table, path="precompute/with", shards=2))
    job = make_local_job(table, path="precompute/without", shards=3, side_inputs=False)
    found = preview(job, 0)
    assert groups(found) == {("reused",): 60, ("changed", "side input businesses"): 30}
    assert found.changes == (Change(part="side inputs", was="businesses", now="left out"),)
    ledger, _ = run_here(job)
    assert (ledger.reused, ledger.computed, ledger.missing_side_inputs) == (60, 30, {})
    for row in rows_of(job, ledger).to_pylist():
        assert not row["businesses"], "an answer's row says what was shown"
        assert row["answer_key"] == answer_key(segmentation.messages(row["query"]), job.settings)
    assert groups(preview(make_local_job(table, path="precompute/again", shards=1), 0)) == {("reused",): 90}


def test_with_and_without_are_two_jobs(root: str, store: Storage) -> None:
    make_plan(store, head=["a", "b"])
    shown, without, same = (
        precompute.forecast(precompute_config(root, **fields), 0).path for fields in ({}, {"side_inputs": False}, {"side_inputs": True})
    )
    assert shown == same != without


# --- the stage, answers stood in for


def labels_of(task: Task) -> pa.Table:
    rows = [
        {
            "query_key": query_key(f"q{i}"),
            "query": f"q{i}",
            "answer": task.dump({"segments": [{"text": f"q{i}", "label": "topic"}]}),
            "count": 3,
            "stratum": "head" if i < 60 else "torso" if i < 90 else "tail",
            "businesses": ["joe's"] if i < SIDED else [],
        }
        for i in range(ROWS)
    ]
    return pa.Table.from_pylist(rows, schema=with_side_inputs(HUMAN_LABELS, ["businesses"]))


class Stand:
    """Precompute: a teacher that is right on nine of ten rows, and on three of ten with their side inputs left out; a student that
    was never shown any and is right on four of five. Rows without side inputs are all wrong the second time: nobody may count them."""

    def __init__(self, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.asked = store, list[precompute.Config]()
        monkeypatch.setattr(precompute, "run", self.run)

    def run(self, config: precompute.Config) -> Receipt:
        self.asked.append(config)
        receipt, name = load_ref(self.store, config.inputs[0])
        lines = []
        for i, row in enumerate(output_table(self.store, receipt, name).to_pylist()):
            right = self.right(config, i) and (config.side_inputs or i < SIDED)
            answer = row["answer"] if right else row["answer"].replace("topic", "name")
            key = query_key(f"{row['query']} {config.side_inputs and config.source == 'teacher' and i < SIDED}")
            lines.append({**row, "answer": answer, "answer_key": key, "state": "answered", "confidence": 0.9})
        mark = f"{config.source}{config.side_inputs}".lower().ljust(16, "0")
        table = pa.Table.from_pylist(lines, schema=ANSWER)
        return keep(self.store, "precompute", mark, {"answers/shard-00000": table}, result=answered_by(source=config.source))

    def right(self, config: precompute.Config, i: int) -> bool:
        if config.source == "batch_student":
            return i % 5 > 0
        return i % 10 > (0 if config.side_inputs else 6)


@pytest.fixture
def stand(store: Storage, segmentation: Task, monkeypatch: pytest.MonkeyPatch) -> Stand:
    keep(store, "plan", PLAN, {"human_labels": labels_of(segmentation)})
    return Stand(store, monkeypatch)


def test_run(store: Storage, stand: Stand) -> None:
    config = gap.Config(root=store.root, tracking=OFF, student=ModelConfig(model="distill/a"), evaluate=evaluate.Config(resamples=400))
    receipt = gap.run(config)
    assert [(one.source, one.side_inputs, one.model.model) for one in stand.asked] == [
        ("teacher", True, "example:teacher"),
        ("teacher", False, "example:teacher"),
        ("batch_student", True, "distill/a"),
        ("batch_student", False, "distill/a"),
    ]
    assert {one.inputs for one in stand.asked} == {(f"plan/{PLAN}:human_labels",)}
    table = output_table(store, receipt, "gap")
    assert table.schema == gap.GAP
    found = {(line["model"], line["shown"], line["stratum"]): line for line in table.to_pylist()}
    assert {stratum for _, _, stratum in found} == {"head", "torso", "all"}, "no row of the tail has side inputs"
    assert (receipt.rows["human_labels"], receipt.rows["with_side_inputs"]) == (ROWS, SIDED)
    assert (receipt.rows["asked_otherwise.teacher"], receipt.rows["asked_otherwise.batch_student"]) == (SIDED, 0)
    shown, without = found["teacher", True, "all"], found["teacher", False, "all"]
    assert (shown["n"], shown["labelled"], found["teacher", True, "torso"]["n"], found["teacher", True, "torso"]["labelled"]) == (
        70,
        120,
        10,
        30,
    )
    assert (shown["quality"], without["quality"]) == (pytest.approx(0.9), pytest.approx(0.3))
    assert without["effect"] == without["difference"] == pytest.approx(-0.6)
    assert -0.75 < without["effect_low"] < -0.6 < without["effect_high"] < -0.45
    assert shown["effect"] is None
    assert shown["difference"] is None
    student = found["batch_student", False, "all"]
    assert student["quality"] == pytest.approx(0.8)
    assert student["effect"] == 0, "rows without side inputs, wrong the second time, are not counted"
    assert student["difference"] == pytest.approx(-0.1)
    assert receipt.result.real == {"teacher": True, "batch_student": False}
    said = receipt.result.verdicts
    assert said["teacher"].startswith("teacher: the gap is real: -60.0 points (-")
    assert said["teacher"].endswith("without side inputs, on 70 rows that have them")
    assert "asked the same both times" in said["batch_student"]
    assert any("tail, unseen: no labelled row has side inputs" in note for note in receipt.notes)
    assert any("torso: only 10 labelled rows" in note for note in receipt.notes)
    assert receipt.metrics["effect/teacher_without/all"] == without["effect"]
    assert receipt.metrics["difference/batch_student/head"] == found["batch_student", True, "head"]["difference"]
    assert "gap.svg" in receipt.outputs
    assert gap.run(config).reused


def test_one_model_and_another_student_are_other_measurements(store: Storage, stand: Stand) -> None:
    config = gap.Config(root=store.root, tracking=OFF, evaluate=evaluate.Config(resamples=400))
    alone = gap.run(config)
    assert {line["model"] for line in output_table(store, alone, "gap").to_pylist()} == {"teacher"}
    assert not any("two_stage" in note for note in alone.notes)
    both = gap.run(config.model_copy(update={"student": ModelConfig(model="distill/a")}))
    assert both.path != alone.path


def test_a_student_that_leans_on_side_inputs_is_told_what_to_do(store: Storage, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand, "right", lambda config, i: config.side_inputs or i % 2 == 0)
    receipt = gap.run(gap.Config(root=store.root, tracking=OFF, student=ModelConfig(model="distill/a")))
    assert receipt.result.real["batch_student"]
    assert any("two_stage=true" in note for note in receipt.notes)


def test_what_cannot_be_measured_is_refused(store: Storage, stand: Stand, segmentation: Task) -> None:
    config = gap.Config(root=store.root, tracking=OFF)
    with pytest.raises(ConfigError, match="no side inputs"):
        gap.run(config.model_copy(update={"task": "query_intent"}))
    labels = labels_of(segmentation)
    for mark, table in (("e" * 16, labels.slice(SIDED)), ("f" * 16, labels.drop_columns(["businesses"]))):
        keep(store, "plan", mark, {"human_labels": table})
        with pytest.raises(InputError, match="no labelled row has side inputs"):
            gap.run(config)
    assert not stand.asked
    with pytest.raises(ConfigError, match="studnet"):
        build_config(gap.Config, {"studnet": {"model": "distill/a"}}, "test")


def scored(shown: Sequence[bool], without: Sequence[bool]) -> pa.Table:
    rows = [
        {"query_key": query_key(f"q{i}"), "query": "q", "stratum": "head", "count": 1, "source": source, "wanted": "{}", "given": "{}"}
        | {"state": "answered", "tp": int(right), "fp": int(not right), "fn": int(not right), "exact": right, "confidence": 0.5}
        for source, rights in (("teacher", shown), ("teacher_without", without))
        for i, right in enumerate(rights)
    ]
    return pa.Table.from_pylist(rows, schema=SCORED)


def test_a_gap_is_rarely_called_real_where_there_is_none_and_found_where_there_is_one() -> None:
    """Paired rows, right in nine of ten both times, the second time drawn anew for a quarter of them; then ten points worse."""
    keys, rng = pa.array([query_key(f"q{i}") for i in range(200)], pa.binary(16)), np.random.default_rng(0)
    called = {0.9: 0, 0.5: 0}
    for least in called:
        for _ in range(100):
            shown = rng.random(200) < 0.9
            without = np.where(rng.random(200) < 0.25, rng.random(200) < least, shown)
            made = list(gap.gap_rows(scored(shown.tolist(), without.tolist()), keys, ["teacher"], Sureness(0.95, 200, 0)))
            called[least] += gap.significant_losses(made)["teacher"]
    assert called[0.9] <= 7, "nominal: 2.5 of 100"
    assert called[0.5] >= 85


# --- for real: a task whose side inputs decide, a student that leans on them, and one that was taught in two stages

SHOP = """
name: shop
input: query
side_inputs: [seen]
answer:
  type: object
  properties: {kind: {enum: [name, thing]}}
  required: [kind]
  additionalProperties: false
sampling: {max_tokens: 16}
score: {kind: label, field: kind}
fallback: {kind: thing}
"""
PROMPT = "{% block user %}{% if seen %}Seen: {{ seen | join('; ') }}\n{% endif %}Query: {{ query }}{% endblock %}\n"
WORDS = [f"{a}{b}" for a in ("bo", "ka", "lu", "mi", "ne", "ro") for b in ("dar", "fin", "gol", "hem")]
FILLERS = ("near me", "tonight", "in town", "cheap", "open late", "best", "find", "the")


def shop_rows(n: int, seed: int, without: set[str]) -> list[tuple[str, str, list[str]]]:
    """(query, answer, side inputs): every other word is a shop's name, and people who asked for one looked at a shop."""
    rng, found = random.Random(seed), dict[str, tuple[str, str, list[str]]]()
    while len(found) < n:
        place = rng.randrange(len(WORDS))
        query = " ".join([*rng.sample(FILLERS, 1), WORDS[place], *rng.sample(FILLERS, rng.randint(0, 2))])
        name = place % 2 == 0
        if query not in without:
            found[query] = query, json.dumps({"kind": "name" if name else "thing"}), ["a shop"] if name else []
    return list(found.values())


@pytest.fixture
def shop(store: Storage, tmp_path: Path) -> Task:
    """Training rows and human labels of that task, in the store."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "task.yaml").write_text(SHOP)
    (tmp_path / "shop" / "prompt.j2").write_text(PROMPT)
    task = load_task(tmp_path / "shop")
    labels = shop_rows(160, 1, set())
    training_set = shop_rows(400, 2, {query for query, _, _ in labels})
    common = {"weight": 1.0, "origin": "teacher", "answer_key": None, "count": 1, "stratum": "head"}
    for stage, name, kind, rows in (("plan", "human_labels", HUMAN_LABELS, labels), ("curate", "training_set", TRAINING_SET, training_set)):
        made = [{**common, "query_key": query_key(q), "query": q, "answer": task.dump(json.loads(a)), "seen": s} for q, a, s in rows]
        schema = with_side_inputs(kind, ["seen"])
        columns = [{name: row.get(name) for name in schema.names} for row in made]
        keep(store, stage, PLAN, {name: pa.Table.from_pylist(columns, schema=schema)})
    return task


@pytest.mark.slow
def test_two_stages_close_the_gap(root: str, store: Storage, shop: Task, train_here: None, answer_here: None) -> None:
    """Trained twice, then all four answers and the verdict: the gap is there by construction, and closed by most of it."""
    config = distill.Config(
        root=root,
        tracking=OFF,
        student="encoder",
        io_format=IOFormat(side_inputs=True),
        sets=(distill.TrainingSet(task=str(shop.folder), training_set="curate:training_set"),),
        labels=("plan:human_labels",),
        near_labels=None,
        base=BaseModelConfig(shape=Shape(vocabulary=300, hidden=32, layers=2, heads=2, feed_forward=64, positions=64)),
        lora=None,
        encoder=Settings(pretrain_epochs=0, misspelt_share=0, corrections=0),
        two_stage=True,
        epochs=6,
        batch_rows=32,
        learning_rate=5e-3,
        precision="fp32",
        zero_stage=0,
        workers=1,
    )
    made = distill.run(config)
    first, second = made.result.stages
    assert (first.side_inputs, second.side_inputs, second.path) == ("shown", "left out", made.path)
    leaning, cured = ModelConfig(model=first.path), ModelConfig(model=made.path)
    found = gap.run(gap.Config(root=root, tracking=OFF, task=str(shop.folder), teacher=leaning, student=cured))
    n = found.rows["with_side_inputs"]
    assert (found.rows["asked_otherwise.teacher"], found.rows["asked_otherwise.batch_student"]) == (n, 0)
    assert found.result.real == {"teacher": True, "batch_student": False}
    whole = {(x["model"], x["shown"]): x for x in output_table(store, found, "gap").to_pylist() if x["stratum"] == "all"}
    assert whole["teacher", True]["quality"] > 0.95
    assert whole["teacher", False]["effect"] < -0.3
    assert whole["batch_student", False]["quality"] - whole["teacher", False]["quality"] > 0.2
    assert open_storage(root).read("distill/LATEST").decode() == made.path
