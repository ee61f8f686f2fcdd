"""The ablation: every variant is curated as it says, judged on the same human labels, compared with the first. Training is stood in for."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from bench.suspects import OFF, example_answers
from conftest import answered_by, keep
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.core.config import build_config
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, TRAINING_SET, with_side_inputs
from headtail.core.task import Task
from headtail.releases.traffic import label_rows
from headtail.review.decision import Decision, current_moment
from headtail.review.log import DecisionLog
from headtail.stages import curate, distill, precompute
from headtail.studies import ablate

LABELS_REF = f"plan/{'p' * 16}:human_labels"


@pytest.fixture
def config(store: Storage, intent: Task) -> ablate.Config:
    """Answers, a tenth of them unsure; human labels of 80 other queries; people's answers to train on; one decision."""
    answers = example_answers(intent, 400)
    sure = pa.array([0.2 if i % 10 == 0 else 0.9 for i in range(320)], pa.float32())
    at = answers.schema.get_field_index("confidence")
    keep(
        store,
        "precompute",
        "t" * 16,
        {"answers/shard-00000": answers.slice(0, 320).set_column(at, "confidence", sure)},
        result=answered_by(),
    )
    labels = label_rows(answers.slice(320), "labels")
    keep(store, "plan", "p" * 16, {"human_labels": labels})
    keep(store, "ingest", "i" * 16, {"human_labels_train": label_rows(answers.slice(0, 50), "labels")})
    row = answers.slice(0, 1).to_pylist()[0]
    holds = intent.dump({"intent": "booking" if "booking" not in row["answer"] else "price"})
    made = Decision(row["query_key"], row["query"], "correct", holds, row["answer"], row["answer_key"], "anna", current_moment(), "")
    DecisionLog(store, intent.name).record([made], "page")
    off = curate.Config(near_labels=None, suspicion=curate.Suspicion(drop_above=0.5))
    return ablate.Config(root=store.root, tracking=OFF, task="query_intent", human="ingest:human_labels_train", curate=off)


class Stand:
    """Distill and precompute in one: a student right on as many labelled rows, in order, as it had training rows over five."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.training_sets: list[pa.Table] = []
        monkeypatch.setattr(distill, "run", self.distill)
        monkeypatch.setattr(precompute, "run", self.precompute)

    def distill(self, config: distill.Config) -> Receipt:
        store = open_storage(config.root)
        receipt, name = load_ref(store, config.sets[0].training_set)
        self.training_sets.append(output_table(store, receipt, name))
        assert config.labels == (LABELS_REF,)
        return keep(store, "distill", f"{len(self.training_sets):016d}", {"training_set": self.training_sets[-1]})

    def precompute(self, config: precompute.Config) -> Receipt:
        store = open_storage(config.root)
        assert config.model.model == f"distill/{len(self.training_sets):016d}"
        assert (config.inputs, config.source) == ((LABELS_REF,), "batch_student")
        labels, name = load_ref(store, "plan:human_labels")
        lines: list[dict[str, Any]] = []
        for place, row in enumerate(output_table(store, labels, name).to_pylist()):
            right = place < self.training_sets[-1].num_rows / 5
            answer = row["answer"] if right else '{"intent":"booking"}'
            lines.append({**row, "answer": answer, "answer_key": row["query_key"], "state": "answered", "confidence": 0.9})
        mark, table = f"{len(self.training_sets):016d}", pa.Table.from_pylist(lines, schema=ANSWER)
        return keep(store, "precompute", mark, {"answers/shard-00000": table}, result=answered_by())


@pytest.mark.slow
def test_run(store: Storage, config: ablate.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch)
    receipt = ablate.run(config)
    raw, reviewed, filtered, relabelled, human = stand.training_sets
    assert raw.num_rows == 320
    assert 280 <= filtered.num_rows <= 288, "the unsure are gone, and the odd suspect"
    assert set(raw["origin"].to_pylist()) == {"teacher"} == set(filtered["origin"].to_pylist())
    assert reviewed.num_rows == 320
    assert reviewed["origin"].to_pylist().count("human") == relabelled["origin"].to_pylist().count("human") == 1
    decided = relabelled.filter(pc.equal(relabelled["origin"], "human"))["query"].to_pylist()
    assert decided[0] not in filtered["query"].to_pylist(), "a person's answer to an unsure row is learnt from"
    assert abs(relabelled.num_rows - filtered.num_rows - 1) <= 2  # it also moves what the small models think of its neighbours
    assert human.num_rows == 50
    assert raw.schema == with_side_inputs(TRAINING_SET, [])
    table = output_table(store, receipt, "ablation")
    assert table.schema == ablate.ABLATION
    whole = {row["variant"]: row for row in table.to_pylist() if row["stratum"] == "all"}
    assert list(whole) == ["raw", "reviewed", "filtered", "relabelled", "human"]
    assert whole["raw"]["difference"] is None
    assert whole["raw"]["n"] == 80
    assert whole["human"]["difference"] == pytest.approx(whole["human"]["quality"] - whole["raw"]["quality"])
    assert whole["human"]["difference_high"] < 0
    assert (whole["relabelled"]["trained_on"], whole["relabelled"]["by_people"]) == (relabelled.num_rows, 1)
    assert receipt.metrics["quality/raw/all"] == whole["raw"]["quality"]
    assert "ablation.svg" in receipt.outputs
    assert {row["stratum"] for row in table.to_pylist()} <= {"head", "torso", "tail", "unseen", "all"}


def test_one_variant_is_no_ablation(config: ablate.Config) -> None:
    with pytest.raises(ConfigError, match="two variants"):
        ablate.run(config.model_copy(update={"human": "", "variants": ("raw", "human")}))
    with pytest.raises(ConfigError, match="variants"):
        build_config(ablate.Config, {"variants": ["raw", "cooked"]}, "test")
