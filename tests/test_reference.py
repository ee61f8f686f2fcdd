"""The shipped models: small enough, whole, and described by a card with measured figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from headtail.engines.models import SHIPPED
from headtail.studies.reference import Config


@pytest.mark.parametrize("name", ["teacher", "student-base"])
def test_each_folder_is_a_model_with_a_card(name: str) -> None:
    folder = SHIPPED / name
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] in ("llama", "qwen2")
    assert (folder / "tokenizer.json").is_file()
    assert re.search(r"loss per answer token \d\.\d+", (folder / "README.md").read_text())


def test_both_fit_in_15_mb() -> None:
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 15_000_000


def test_teacher_card_states_quality_on_held_out_labels() -> None:
    card = (SHIPPED / "teacher" / "README.md").read_text()
    rows = re.findall(r"\| (query_\w+) \| (\w+) \| (0\.\d+) \|", card)
    assert {task for task, _, _ in rows} == {"query_segmentation", "query_intent"}


def test_training_keeps_the_quickstarts_human_labels_out() -> None:
    config = Config()
    assert config.teacher_data.avoid_labels_seed == config.base_data.avoid_labels_seed == config.labels_data.seed
    assert Path(config.into) == SHIPPED
