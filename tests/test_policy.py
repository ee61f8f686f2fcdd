"""The policy of a task: levels that sum to delta for ever, a digest that says when it was changed, and nonsense refused."""

from __future__ import annotations

import dataclasses

import pytest

from headtail.core.config import build_config
from headtail.core.errors import ConfigError
from headtail.core.policy import TaskPolicy
from headtail.core.task import Task, load_task

pytestmark = pytest.mark.usefixtures("not_drawn")


def test_levels_sum_to_delta_for_ever() -> None:
    policy = TaskPolicy(delta=0.05)
    assert [policy.level(look) for look in (1, 2, 3)] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert 0.0499 < sum(policy.level(look) for look in range(1, 10_000)) <= 0.05
    planned = TaskPolicy(delta=0.05, looks=4)
    assert [planned.level(look) for look in (1, 4, 5)] == [0.0125, 0.0125, 0.0]


def test_a_policy_that_asks_nothing_or_nonsense_is_refused() -> None:
    for data, match in (
        ({"minimum": {}, "max_drop": None, "above_fallback": False}, "there is no criterion"),
        ({"minimum": {"tial": 0.9}}, "unknown stratum tial"),
        ({"minimum": {"tail": 1.0}}, "no number of labels can show 1"),
        ({"relative_on": ["everyone"]}, "unknown stratum everyone"),
        ({"delta": 0.6}, "delta"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_config(TaskPolicy, data, "test")


def test_a_policy_is_looser_in_each_field_that_asks_for_less() -> None:
    before = TaskPolicy(minimum={"tail": 0.9}, max_drop=0.05, relative_on=("all", "tail"), least_labels=50, delta=0.05)

    def looser(**changes: object) -> list[str]:
        return TaskPolicy.model_validate({**before.model_dump(), **changes}).looser_than(before)

    assert looser() == looser(minimum={"tail": 0.91, "head": 0.5}, max_drop=0.0, least_labels=60, delta=0.01) == []
    for changes in (
        *({"minimum": {"head": 0.99}}, {"minimum": {"tail": 0.89}}, {"max_drop": 0.06}, {"max_drop": None}, {"above_fallback": False}),
        *({"relative_on": ["tail"]}, {"least_labels": 1}, {"delta": 0.06}, {"looks": 3}, {"score": "f1"}),
    ):
        assert looser(**changes) == list(changes)
    assert TaskPolicy().looser_than(TaskPolicy(minimum={"all": 0.5}, max_drop=None, above_fallback=False, relative_on=("tail",))) == [
        "minimum"
    ]


def test_the_digest_changes_with_the_policy_and_with_how_answers_are_compared(intent: Task) -> None:
    def digest(**changes: object) -> str:
        return dataclasses.replace(intent, file=intent.file.model_copy(update=changes)).policy_digest

    assert digest() == intent.policy_digest == digest(description="other words", version=9)
    assert len({digest(), digest(gate=TaskPolicy(delta=0.1)), digest(fallback={"intent": "price"})}) == 3
    assert (
        dataclasses.replace(intent, file=intent.file.model_copy(update={"gate": TaskPolicy(delta=0.1)})).fingerprint == intent.fingerprint
    )


@pytest.mark.parametrize("name", ["query_segmentation", "query_intent"])
def test_shipped_tasks_have_a_policy(name: str) -> None:
    assert "gate" in load_task(name).file.model_fields_set
