"""Merging: the folder that is served gives the logits of what was trained, a lost adapter is caught, logits of answers alone are held."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headtail.core.errors import TrainingError
from headtail.examples import example_data
from headtail.stages.distill.base import Shape, load_base, make_decoder_base
from headtail.stages.distill.learner import DecoderLearner
from headtail.stages.distill.merge import merge_lora, relative_drift
from headtail.stages.distill.tokenizer import train_tokenizer

TINY = Shape(vocabulary=400, hidden=32, layers=3, heads=2, feed_forward=64, positions=256)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = (found for _, found, _ in example_data.sample(example_data.Config(seed=5), 300, "train/x"))
    return train_tokenizer((text for m in found for text in (m.text, json.dumps(example_data.right_answers(m)["query_segmentation"]))), 400)


def test_merge_equals_adapter_and_a_lost_adapter_is_caught(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    make_decoder_base(TINY, tokenizer, 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_base(str(tmp_path / "base"))[0], LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    learner = DecoderLearner()
    rows = {"ids": [np.arange(10, 40), np.arange(50, 90)], "answer_start": np.array([5, 5])}
    probes = [learner.collate(rows, np.array([i]), np.ones(1), 0) for i in range(2)]
    for name in ("merged", "merged2"):
        tokenizer.save_pretrained(tmp_path / name)
    drift = merge_lora(learner, load_base(str(tmp_path / "base"))[0], tmp_path / "adapter", tmp_path / "merged", probes)
    assert drift < 0.02
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
    with pytest.raises(TrainingError, match="does not give the logits of the one that was trained"):
        merge_lora(learner, load_base(str(tmp_path / "base"))[0], tmp_path / "adapter", tmp_path / "merged2", probes)


def test_relative_drift_is_zero_for_equal_logits() -> None:
    x = [np.random.default_rng(0).normal(size=(3, 4))]
    assert relative_drift(x, x) == 0


def test_relative_drift_is_that_of_all_logits_together() -> None:
    random = np.random.default_rng(1)
    before = [random.normal(5, 2, (n, 40)).astype(np.float32) for n in (1, 7, 30)]
    after = [one + random.normal(0.01, 0.1, one.shape).astype(np.float32) for one in before]
    a, b = np.concatenate(before).astype(float), np.concatenate(after).astype(float)
    assert relative_drift(before, iter(after)) == pytest.approx(np.sqrt(np.mean((a - b) ** 2)) / a.std(), rel=1e-6)
    assert math.isnan(relative_drift([np.full((2, 3), np.nan)], [np.zeros((2, 3))])), "no drift of at most 0.05"
    with pytest.raises(ValueError, match="shorter"):
        relative_drift(before, iter(after[:2]))


def test_only_answers_meet_the_head_when_folders_are_compared(tokenizer: Any) -> None:
    """With a vocabulary of 262,144 the logits of eight prompts of 500 tokens would be 4 GB, and they were held four times."""
    import torch

    learner, model = DecoderLearner(), make_decoder_base(TINY, tokenizer, 0)
    rows = {"ids": [np.arange(10, 10 + n) for n in (9, 30)], "answer_start": np.array([4, 20])}
    arrays = {name: torch.from_numpy(array) for name, array in learner.collate(rows, np.arange(2), np.ones(2), 0).arrays.items()}
    found, whole = learner.outputs(model, arrays), model(input_ids=arrays["ids"], attention_mask=arrays["mask"]).logits
    assert found.shape == (5 + 10, whole.shape[-1])
    assert torch.allclose(found, torch.cat([whole[0, 3:8], whole[1, 19:29]]), atol=1e-5)
