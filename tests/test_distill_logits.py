"""Logit distillation: the loss is the divergence it says, what is stored is what the teacher thinks, misuse is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conftest import answered_by, keep
from headtail.adapters.storage import Storage
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError
from headtail.core.io_format import ModelFormat
from headtail.core.rows import TOP
from headtail.engines.models import ResolvedModel
from headtail.engines.tokens import vocabulary_fingerprint
from headtail.examples import example_data
from headtail.stages import distill
from headtail.stages.distill import launch
from headtail.stages.distill.base import BaseModelConfig, Shape, make_decoder_base
from headtail.stages.distill.learner import DecoderLearner
from headtail.stages.distill.logits import COLUMNS, Logits, check_logits, check_stored, soft_loss, top_k
from headtail.stages.distill.tokenizer import train_tokenizer
from here import fit_here, unmetered

TINY = Shape(vocabulary=400, hidden=32, layers=2, heads=2, feed_forward=64, positions=256)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = (found for _, found, _ in example_data.sample(example_data.Config(seed=5), 300, "train/x"))
    return train_tokenizer((text for m in found for text in (m.text, json.dumps(example_data.right_answers(m)["query_segmentation"]))), 400)


def test_with_the_whole_vocabulary_it_is_the_full_divergence() -> None:
    import torch

    torch.manual_seed(0)
    student, teacher = torch.randn(6, 40), torch.randn(6, 40) * 2
    wanted = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    best = teacher.log_softmax(-1).topk(40)
    assert torch.allclose(soft_loss(student, best.indices, best.values), wanted, atol=1e-5)
    best = teacher.log_softmax(-1).topk(5)
    few = soft_loss(student, best.indices, best.values)
    assert (few <= wanted + 1e-6).all()
    assert (few > 0).all()
    same = soft_loss(teacher, best.indices, best.values)
    assert torch.allclose(same, torch.zeros(6), atol=1e-5), "a student that is the teacher has nothing to learn"


def test_the_rest_bucket_is_pushed_back() -> None:
    """A student sure of the teacher's k tokens although the teacher is not: renormalising over the k would see no fault."""
    import torch

    teacher = torch.tensor([[2.0, 2.0, 1.9, 1.9, 1.9]]).log_softmax(-1)
    best = teacher.topk(2)
    sure = torch.tensor([[9.0, 9.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = soft_loss(sure, best.indices, best.values).sum()
    loss.backward()
    assert loss > 1
    assert sure.grad is not None
    assert (sure.grad[0, :2] > 0).all()


def test_what_is_stored_is_what_the_teacher_thinks(tokenizer: Any, segmentation: Any) -> None:
    """Row by row the k likeliest tokens at each answer token; and a teacher's own loss on them is its entropy gap: none."""
    import torch

    from test_distill import training_table

    model, learner = make_decoder_base(TINY, tokenizer, 3).eval(), DecoderLearner(soft=1.0)
    answers = [{"segments": [{"text": t, "label": "topic"}]} for t in ("pizza", "best tacos in town", "bar")]
    training_set = training_table([(a["segments"][0]["text"], a) for a in answers], segmentation)
    examples = learner.encode(segmentation, tokenizer, training_set, 400, set())
    kept = top_k(model, examples, 4, 0, "cpu")
    row = examples.to_pylist()[1]
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([row["ids"]])).logits[0, row["answer_start"] - 1 : -1].log_softmax(-1).topk(4)
    assert np.array(kept["teacher_ids"][1].as_py()).reshape(-1, 4).tolist() == alone.indices.tolist()
    assert np.allclose(np.array(kept["teacher_logprobs"][1].as_py(), float).reshape(-1, 4), alone.values.numpy(), atol=4e-3)
    for name in COLUMNS:
        examples = examples.append_column(name, kept[name])
    from headtail.stages.distill.batches import example_columns

    batch = learner.collate(example_columns(examples), np.array([2, 0, 1]), np.ones(3), 0)
    total, weight = learner.loss(model.train(), {name: torch.from_numpy(array) for name, array in batch.arrays.items()})
    assert float(total.detach() / weight) < 1e-3
    judged, _ = learner.loss(model.eval(), {name: torch.from_numpy(array) for name, array in batch.arrays.items()})
    assert float(judged.detach()) > 1, "eval_loss is of the answers alone"


def stored(training_set: pa.Table, tokenizer: Any, task: Any, k: int, lost: set[int]) -> pa.Table:
    """Training rows with made-up likeliest tokens; those of `lost` were written in other tokens."""
    rows = []
    for i, row in enumerate(training_set.to_pylist()):
        ids = tokenizer(task.target(json.loads(row["answer"])) + tokenizer.eos_token)["input_ids"]
        n, rng = len(ids), np.random.default_rng(i)
        best = np.stack([rng.permutation(300)[:k] for _ in range(n)])
        sure = np.log(np.sort(rng.dirichlet(np.ones(k + 1), n)[:, :k], axis=1)[:, ::-1]).astype(np.float16)
        top = {"token_ids": [9, *ids] if i in lost else ids, "top_ids": best.ravel(), "top_logprobs": sure.ravel()}
        rows.append({**row, **(dict.fromkeys(top) if i == 0 else top)})  # the first is a person's
    return pa.Table.from_pylist(rows, schema=pa.schema([*training_set.schema, *TOP]))


def test_stored_log_probabilities_are_learnt_where_they_are_of_what_is_to_be_written(tokenizer: Any, segmentation: Any) -> None:
    """A row that has none, or none of these tokens, learns from the written token alone: its loss is the cross entropy."""
    import torch

    from headtail.stages.distill.batches import example_columns
    from test_distill import training_table

    texts = ("pizza", "best tacos in town", "bar", "tea")
    training_set = training_table([(t, {"segments": [{"text": t, "label": "topic"}]}) for t in texts], segmentation)
    kept = stored(training_set, tokenizer, segmentation, 4, lost={3})
    learner, model = DecoderLearner(soft=1.0, stored=3), make_decoder_base(TINY, tokenizer, 3)
    examples = learner.encode(segmentation, tokenizer, kept, 400, set())
    assert examples["soft"].to_pylist() == [False, True, True, False]
    there = np.array(kept["top_ids"][1].as_py()).reshape(-1, 4)
    assert np.array(examples["teacher_ids"][1].as_py()).reshape(-1, 3).tolist() == there[:, :3].tolist()
    rows, plain = example_columns(examples), DecoderLearner()

    def loss(asked: DecoderLearner, i: int) -> Any:
        batch = asked.collate(rows, np.array([i]), np.ones(1), 0)
        total, weight = asked.loss(model.train(), {name: torch.from_numpy(array) for name, array in batch.arrays.items()})
        return total / weight

    for i in (0, 3):
        assert torch.allclose(loss(learner, i), loss(plain, i), atol=1e-5)
    assert abs(float((loss(learner, 1) - loss(plain, 1)).detach())) > 0.1
    model.zero_grad()
    loss(learner, 0).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ConfigError, match=r"stored are 4"):
        DecoderLearner(soft=1.0, stored=5).encode(segmentation, tokenizer, kept, 400, set())


def test_stored_log_probabilities_of_another_vocabulary_or_none_are_refused(tokenizer: Any, store: Storage) -> None:
    known = keep(store, "precompute", "a" * 16, {}, result=answered_by(vocabulary=vocabulary_fingerprint(tokenizer)))
    check_stored("decoder", tokenizer, known, "curate:training_set")
    with pytest.raises(ConfigError, match="only a decoder"):
        check_stored("encoder", tokenizer, known, "curate:training_set")
    for source in (None, keep(store, "precompute", "b" * 16, {}, result=answered_by())):
        with pytest.raises(ConfigError, match="top_logprobs=8"):
            check_stored("decoder", tokenizer, source, "curate:training_set")
    other = keep(store, "precompute", "c" * 16, {}, result=answered_by(vocabulary="another"))
    with pytest.raises(ConfigError, match="vocabulary is not the student's"):
        check_stored("decoder", tokenizer, other, "curate:training_set")


def test_another_vocabulary_or_format_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    other = train_tokenizer(["some other text, quite another"] * 3, 300)
    other.save_pretrained(tmp_path)
    make_decoder_base(TINY, other, 0).save_pretrained(tmp_path)
    teacher = ResolvedModel(str(tmp_path), "digest", "other")
    with pytest.raises(ConfigError, match="vocabulary is not the student's"):
        check_logits("decoder", ModelFormat(), tokenizer, teacher)
    check_logits("decoder", ModelFormat(), other, teacher)
    for student, fmt in (("encoder", ModelFormat()), ("decoder", ModelFormat(prompt="query_only", task="x"))):
        with pytest.raises(ConfigError, match="in the default I/O format"):
            check_logits(student, fmt, other, teacher)


@pytest.mark.slow
def test_a_student_learns_from_its_teachers_logits_on_two_workers(root: str, teacher_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the shipped teacher's layers, mostly taught by its logits; the bytes are in the receipt.

    Real DeepSpeed ZeRO-2 on gloo: the loss falls, and a finished run keeps no checkpoint. Ray Train with two workers is tested in
    test_distill_train.
    """
    monkeypatch.setattr(launch, "_fit", fit_here(2))
    monkeypatch.setattr("headtail.adapters.meter.job_meter", unmetered)
    off = TrackingConfig(enabled=False)
    rows = example_data.run(example_data.Config(root=root, tracking=off, events=500, days=2, train=96, labels=40, seed=3))
    config = distill.Config(
        root=root,
        tracking=off,
        sets=(distill.TrainingSet(training_set=f"{rows.path}:train_query_segmentation"),),
        labels=(),
        base=BaseModelConfig(model="example:teacher", layers=3),
        lora=None,
        logits=Logits(teacher="example:teacher", k=4, share=0.7),
        learning_rate=1e-3,
        epochs=2,
        log_steps=2,
        checkpoint_steps=5,
        held_out_share=0.2,
    )
    made = distill.run(config)
    curve = json.loads((Path(root) / made.output("history").path).read_text())
    assert curve[-1]["eval_loss"] < 0.85 * curve[0]["eval_loss"]
    assert made.rows["training_set"] + made.rows["held_out"] == rows.output("train_query_segmentation").rows
    assert not list((Path(root) / made.path).glob("work/**/*.pt"))
    assert made.inputs["teacher"]
    tokens = 40  # of a short answer, about; 4 tokens of 6 bytes each
    assert 100 < made.metrics["logits_bytes_per_row"] < tokens * 4 * 6 * 2
