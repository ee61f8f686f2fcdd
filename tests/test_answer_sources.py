"""Where no answers are named: each source's own run, never another source's under its name; of several runs none is guessed."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import answered_by, keep
from headtail.adapters import append_log
from headtail.adapters.storage import Storage
from headtail.batch.answer_sources import source_ref, sources_of_labels
from headtail.batch.catalog import FOLDER, CatalogEntry
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError
from headtail.core.task import Task
from headtail.stages import curate, evaluate, publish
from test_evaluate import INTENTS, answer_table, intent_of, labels_table

pytestmark = pytest.mark.usefixtures("not_drawn")

OFF = TrackingConfig(enabled=False)
LABELS = "plan/" + "p" * 16
QUERIES = [f"q{i}" for i in range(40)]


def answered(store: Storage, task: Task, mark: str, source: str, right: int, asked: str = "human_labels", prompt: str = "") -> None:
    """A finished job of the catalog: right on the first `right` queries. It becomes the store's latest precompute."""
    rows = [(q, intent_of(INTENTS[i % 4] if i < right else "how_to"), "answered", 0.9) for i, q in enumerate(QUERIES)]
    path = f"precompute/{mark * 16}"
    about: dict[str, Any] = {"task": task.name, "task_fingerprint": prompt or task.fingerprint, "inputs": {f"{LABELS}.{asked}": LABELS}}
    keep(store, "precompute", mark * 16, {"answers/shard-00000": answer_table(rows)}, result=answered_by(mark, mark, source), **about)
    enter(store, path, task.name, source, mark)


def enter(store: Storage, path: str, task: str, source: str, model: str) -> None:
    about: dict[str, Any] = {"settings": "s", "parts": {}, "template": "", "began": "2030-01-01T00:00:00+00:00"}
    entry = CatalogEntry(path=path, task=task, source=source, model=model, **about)
    append_log.append_entry(store, FOLDER, lambda _: entry.model_dump_json().encode())


@pytest.fixture
def shop(store: Storage, intent: Task) -> Storage:
    """A teacher, all right, then a student, half right, whose run is the latest; a job that is not finished, and one of another task."""
    keep(
        store, "plan", "p" * 16, {"human_labels": labels_table([(q, intent_of(INTENTS[i % 4]), "head", 9) for i, q in enumerate(QUERIES)])}
    )
    answered(store, intent, "a", "teacher", 40)
    answered(store, intent, "b", "batch_student", 20)
    answered(store, intent, "c", "realtime_student", 20, asked="head")
    answered(store, intent, "d", "batch_student", 20)
    store.remove("precompute/" + "d" * 16 + "/receipt.json")
    enter(store, "precompute/" + "e" * 16, "other_task", "teacher", "e")
    store.replace("precompute/LATEST", b"precompute/" + b"b" * 16)
    return store


def config(store: Storage, **fields: Any) -> evaluate.Config:
    return evaluate.Config(root=store.root, tracking=OFF, task="query_intent", resamples=200, **fields)


def test_each_source_is_scored_by_its_own_answers(shop: Storage, intent: Task, capsys: pytest.CaptureFixture[str]) -> None:
    receipt = evaluate.run(config(shop))
    assert receipt.result.answers == {"teacher": "precompute/" + "a" * 16, "batch_student": "precompute/" + "b" * 16}
    assert (receipt.metrics["exact/teacher/all"], receipt.metrics["exact/batch_student/all"]) == (1.0, 0.5)
    shown = capsys.readouterr().err
    assert "teacher F1 1.000 (0.9" in shown
    assert "n = 40  precompute/" + "b" * 16 in shown


def test_no_source_gets_anothers_answers_under_its_name(shop: Storage, intent: Task) -> None:
    for name, ref in (("teacher", "precompute"), ("teacher", "latest"), ("batch_student", "precompute/" + "a" * 16)):
        with pytest.raises(ConfigError, match=f"not answers of {name}"):
            evaluate.run(config(shop, answers={name: ref}))
    assert not shop.files("looks"), "a refusal is no look"
    assert evaluate.run(config(shop, answers={"another": "latest"})).metrics["exact/another/all"] == 0.5


def test_of_several_runs_none_is_guessed(shop: Storage, intent: Task) -> None:
    answered(shop, intent, "f", "teacher", 30, prompt="an older prompt")
    assert sources_of_labels(shop, intent, f"{LABELS}:human_labels")["teacher"] == "precompute/" + "a" * 16
    answered(shop, intent, "g", "teacher", 30)
    with pytest.raises(ConfigError, match="several runs") as refused:
        evaluate.run(config(shop))
    text = str(refused.value)
    assert "precompute/" + "a" * 16 in text
    assert f"--set answers.teacher=precompute/{'g' * 16} --set answers.batch_student=precompute/{'b' * 16}" in text
    with pytest.raises(ConfigError, match="was asked the labelled queries"):
        sources_of_labels(shop, intent, f"{LABELS}:tail")


def test_a_training_set_is_of_the_teachers_answers(shop: Storage, intent: Task) -> None:
    teacher = "precompute/" + "a" * 16
    assert source_ref(shop, intent, "precompute", "teacher") == teacher
    assert source_ref(shop, intent, "precompute/" + "b" * 16, "teacher") == "precompute/" + "b" * 16, "what was named is taken"
    answered(shop, intent, "g", "teacher", 30)
    assert source_ref(shop, intent, "latest", "teacher") == "precompute/" + "g" * 16, "the latest, and the teacher's"
    shop.replace("precompute/LATEST", b"precompute/" + b"b" * 16)
    with pytest.raises(ConfigError, match="the latest precompute is of batch_student, not of teacher") as refused:
        curate.run(curate.Config(root=shop.root, tracking=OFF, task="query_intent"))
    assert teacher in str(refused.value)


def test_a_students_answers_are_not_published_where_nobody_named_them(shop: Storage, intent: Task) -> None:
    with pytest.raises(ConfigError, match="the latest precompute is of batch_student, not of the teacher") as refused:
        publish.run(publish.Config(root=shop.root, tracking=OFF, task="query_intent"))
    assert f"answers=[precompute/{'a' * 16},precompute/{'b' * 16},precompute/{'c' * 16}]" in str(refused.value)
