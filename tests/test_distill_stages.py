"""Two-stage distillation: which rows each stage is shown, whose weights the second goes on from, and that a kill repeats neither.

Training itself is stood in for here; tests/test_gap.py trains for real.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from conftest import keep
from headtail.adapters.storage import Storage, write_table
from headtail.core import io_format
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError
from headtail.core.task import Task
from headtail.engines.models import weights_digest
from headtail.stages import distill
from headtail.stages.distill.base import BaseModelConfig, Shape, load_base, make_decoder_base
from headtail.stages.distill.encoder import Settings
from headtail.stages.distill.learner import DecoderLearner
from headtail.stages.distill.logits import COLUMNS, Logits, top_k
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.distill.result import TrainingTotals
from headtail.stages.distill.rows import Rows, count_left_out, with_side
from headtail.stages.distill.tokenizer import train_tokenizer
from headtail.stages.distill.train import Spec, add_teacher_logits
from test_distill_encoder import rows_of
from test_engines_encoder import training_table

OFF = TrackingConfig(enabled=False)
TINY = Shape(vocabulary=400, hidden=32, layers=1, heads=2, feed_forward=32, positions=256)


def golden_of(task: Task, n: int = 40) -> pa.Table:
    """Every other row has a business."""
    table = training_table(list(dict(rows_of(task, n)).items()), task)
    sides: list[list[str]] = [["blue fox"] if i % 2 == 0 else [] for i in range(table.num_rows)]
    at = table.schema.get_field_index("businesses")
    return table.set_column(at, table.schema.field(at), pa.array(sides, table.schema.field(at).type))


def test_left_out_changes_nothing_but_side_inputs(segmentation: Task) -> None:
    training_set = golden_of(segmentation)
    assert with_side(training_set, segmentation).tolist() == [i % 2 == 0 for i in range(training_set.num_rows)]
    bare = count_left_out(Rows(training_set, training_set.slice(0, 3)), segmentation)
    assert not with_side(bare.training_set, segmentation).any()
    assert not with_side(bare.held_out, segmentation).any()
    assert bare.training_set.schema == training_set.schema
    assert bare.training_set.drop_columns(["businesses"]) == training_set.drop_columns(["businesses"])
    nothing = training_set.set_column(
        training_set.schema.get_field_index("businesses"), "businesses", pa.nulls(training_set.num_rows, pa.list_(pa.string()))
    )
    assert not with_side(nothing, segmentation).any()


class Seen(NamedTuple):
    """What one training was given."""

    config: distill.Config
    learner: Any
    tokenizer: Any
    examples: pa.Table
    taught: pa.Table | None


class Stand:
    """Training that takes the base as it is. `dies`: the number of the training that is broken off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen, self.dies = list[Seen](), -1
        monkeypatch.setattr("headtail.stages.distill.launch.train_student", self.train)
        monkeypatch.setattr("headtail.stages.distill.finish.finish_student", self.finish)
        monkeypatch.setattr("headtail.stages.distill.finish.record_figures", self.record)

    def train(
        self, config: Any, stage: Any, learner: Any, base: Any, examples: pa.Table, taught: pa.Table | None, teacher: Any
    ) -> dict[str, Any]:
        self.seen.append(Seen(config, learner, base.tokenizer, examples, taught))
        if len(self.seen) - 1 == self.dies:
            raise KeyboardInterrupt
        return {}

    def finish(self, config: Any, stage: Any, learner: Any, base: Any, done: Any, examples: Any) -> str:
        folder = stage.scratch / "made"
        shutil.copytree(base.path, folder)
        base.tokenizer.save_pretrained(folder)
        learner.finish(folder)
        stage.folder("model", folder)
        return "digest"

    def record(self, config: Any, stage: Any, done: Any, examples: Any, base: str, tasks: Any, digest: str) -> DistillResult:
        training = TrainingTotals(examples=3, steps=3, eval_loss=1.0 / len(self.seen), train_seconds=1.0, params=9)
        return DistillResult(digest=digest, base=base, training=training)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(monkeypatch)


@pytest.fixture
def config(store: Storage, segmentation: Task) -> distill.Config:
    keep(store, "curate", "g" * 16, {"training_set": golden_of(segmentation)})
    return distill.Config(root=store.root, tracking=OFF, labels=(), base=BaseModelConfig(shape=TINY), lora=None, two_stage=True)


def texts(seen: Seen) -> list[tuple[str, str]]:
    """(what is read, what is to be written) of a decoder's examples."""
    rows = zip(seen.examples["ids"].to_pylist(), seen.examples["answer_start"].to_pylist(), strict=True)
    return [(seen.tokenizer.decode(ids[:start]), seen.tokenizer.decode(ids[start:])) for ids, start in rows]


def test_the_second_stage_goes_on_without_side_inputs(store: Storage, stand: Stand, config: distill.Config) -> None:
    made = distill.run(config)
    first, second = stand.seen
    shown, bare = texts(first), texts(second)
    assert ["blue fox" in prompt for prompt, _ in shown] == [i % 2 == 0 for i in range(len(shown))]
    assert not any("blue fox" in prompt for prompt, _ in bare)
    assert [target for _, target in bare] == [target for _, target in shown], "the answers that were given with them"
    assert bare[1::2] == shown[1::2], "rows that had none stay as they were"
    assert second.examples["weight"] == first.examples["weight"]
    assert second.examples["held_out"] == first.examples["held_out"]
    stages = made.result.stages
    assert (first.config.base.shape, second.config.base) == (TINY, BaseModelConfig(model=stages[0].path))
    assert [stage.side_inputs for stage in stages] == ["shown", "left out"]
    assert (stages[1].path, stages[0].eval_loss, stages[1].eval_loss) == (made.path, 1.0, 0.5)
    assert made.inputs["first_stage"] == stages[0].path == made.result.base
    assert made.rows["side_inputs_left_out"] == sum(i % 2 == 0 for i in range(len(shown)))
    assert made.fingerprint == distill.student_fingerprint(config)
    assert store.read("distill/LATEST").decode() == made.path
    alone = distill.run(config.model_copy(update={"two_stage": False}))
    assert (alone.reused, alone.path) == (True, stages[0].path), "stage 1 is the ordinary run of this config"
    assert distill.run(config).reused
    assert len(stand.seen) == 2


@pytest.mark.parametrize("dies", [0, 1])
def test_a_kill_repeats_only_the_stage_it_hit(stand: Stand, config: distill.Config, dies: int) -> None:
    stand.dies = dies
    with pytest.raises(KeyboardInterrupt):
        distill.run(config)
    made = distill.run(config)
    assert [seen.config.base.model for seen in stand.seen] == [
        ["", "", made.inputs["first_stage"]],
        ["", *[made.inputs["first_stage"]] * 2],
    ][dies]
    assert distill.run(config).reused


@pytest.mark.parametrize("kind", ["decoder", "encoder", "seq2seq"])
def test_a_student_asked_with_the_query_alone_is_never_shown_them_again(
    store: Storage, stand: Stand, config: distill.Config, segmentation: Task, kind: Any
) -> None:
    chosen = io_format.IOFormat(prompt="query_only", side_inputs=True)
    made = distill.run(config.model_copy(update={"student": kind, "io_format": chosen, "encoder": Settings(pretrain_epochs=0)}))
    first, second = stand.seen
    formats = [json.loads(store.read(f"{stage.path}/model/headtail.json")) for stage in made.result.stages]
    assert [(one["prompt"], one["side_inputs"], one["kind"]) for one in formats] == [
        ("query_only", True, kind),
        ("query_only", False, kind),
    ]
    training_set = golden_of(segmentation)
    plain = training_table([(row["query"], segmentation.parse(row["answer"])[0]) for row in training_set.to_pylist()], segmentation)
    held = {key for key, out in zip(training_set["query_key"].to_pylist(), second.examples["held_out"].to_pylist(), strict=True) if out}
    asked = second.learner.encode(segmentation, second.tokenizer, plain, 400, held)
    assert second.examples["ids"].to_pylist() == asked["ids"].to_pylist()
    assert first.examples["ids"].to_pylist() != asked["ids"].to_pylist()


def base_folder(folder: Path, segmentation: Task) -> Path:
    texts = [text for row in golden_of(segmentation).to_pylist() for text in (row["query"], row["answer"])]
    tokenizer = train_tokenizer(texts, 400)
    for saved in (make_decoder_base(TINY, tokenizer, 0), tokenizer):
        saved.save_pretrained(folder)
    return folder


def test_a_teacher_of_logits_reads_rows_as_it_was_asked(
    stand: Stand, config: distill.Config, segmentation: Task, tmp_path: Path, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its likeliest tokens are those beside the side inputs, at the student's answer tokens: one row each, in the same order."""
    folder = str(base_folder(tmp_path / "base", segmentation))
    distill.run(config.model_copy(update={"base": BaseModelConfig(model=folder), "logits": Logits(teacher=folder, k=4)}))
    first, second = stand.seen
    assert first.taught is None, "in the first stage it reads what the student reads"
    assert second.taught is not None
    assert second.taught == first.examples
    starts = [table["answer_start"].to_pylist() for table in (second.examples, second.taught)]
    ids = [table["ids"].to_pylist() for table in (second.examples, second.taught)]
    assert [row[a:] for row, a in zip(ids[0], starts[0], strict=True)] == [row[a:] for row, a in zip(ids[1], starts[1], strict=True)]

    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    spec = Spec(store, "run", second.learner, (), 0, second.config, None, teacher_digest=weights_digest(Path(folder)))
    write_table(store, spec.taught, second.taught)
    assert second.config.logits is not None
    found = add_teacher_logits(spec, second.config.logits, second.examples, 0, 1)
    with_them, without = (top_k(load_base(folder)[0], table, 4, 0, "cpu") for table in (second.taught, second.examples))
    assert found.drop_columns(list(COLUMNS)) == second.examples
    assert found[COLUMNS[0]].to_pylist() == with_them[COLUMNS[0]].to_pylist()
    given, other = (np.concatenate(table[COLUMNS[1]].to_pylist()) for table in (found, without))
    assert given.shape == other.shape
    assert (given != other).any()


def test_stages_that_would_be_the_same_are_refused(
    store: Storage, stand: Stand, config: distill.Config, segmentation: Task, intent: Task
) -> None:
    for fields in ({"io_format": {"prompt": "query_only"}}, {"student": "encoder"}):
        with pytest.raises(ConfigError, match="shows no side inputs"):
            build_config(distill.Config, {"two_stage": True, **fields}, "test")
    assert build_config(distill.Config, {"two_stage": True, "student": "encoder", "io_format": {"side_inputs": True}}, "test").two_stage
    training_set = count_left_out(Rows(golden_of(segmentation), golden_of(segmentation).slice(0, 0)), segmentation).training_set
    keep(store, "curate", "n" * 16, {"training_set": training_set})
    with pytest.raises(ConfigError, match="no training row has side inputs"):
        distill.run(config)
    keep(store, "curate", "i" * 16, {"training_set": training_table(rows_of(intent, 20), intent)})
    with pytest.raises(ConfigError, match="no task here has side inputs"):
        distill.run(config.model_copy(update={"sets": (distill.TrainingSet(task="query_intent"),)}))
    assert not stand.seen, "nothing was trained"


def test_a_decoder_asked_by_its_task_has_the_default_format(stand: Stand, config: distill.Config) -> None:
    made = distill.run(config)
    assert isinstance(stand.seen[1].learner, DecoderLearner)
    assert "model/headtail.json" not in made.outputs
