"""Scores by edit distance, sets, meaning and own functions, against independent ones; code runs where it is allowed."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Indel

from headtail.core.errors import ConfigError, InputError
from headtail.core.score import Counts, ScoreConfig, f1, score_answer
from headtail.core.scorers import Measure, edit_counts
from headtail.core.task import Task, load_task

texts = st.text("abc ", max_size=12)
EDIT, SET = ScoreConfig(kind="edit", field="text"), ScoreConfig(kind="set", field="tags")


@given(texts, texts)
def test_edit_distance_is_rapidfuzzs(one: str, other: str) -> None:
    found = Counts(*edit_counts(one, other))
    assert f1([found]) == pytest.approx(Indel.normalized_similarity(one, other))
    assert found.right == (one == other)
    assert (found.fp + found.fn) == Indel.distance(one, other)


def test_texts_are_compared_as_queries_are_and_silence_is_no_answer() -> None:
    assert score_answer(EDIT, {"text": "Thai  Food"}, {"text": "thai food"}).right
    assert score_answer(EDIT, {"text": "abc"}, None) == Counts(0, 0, 3)
    assert not score_answer(EDIT, {"text": ""}, None).right


@given(st.lists(st.sampled_from("abcAB")), st.lists(st.sampled_from("abcAB")))
def test_a_set_has_each_value_once_in_any_order(one: list[str], other: list[str]) -> None:
    want, got = {each.lower() for each in one}, {each.lower() for each in other}
    found = score_answer(SET, {"tags": one}, {"tags": random.Random(0).sample(other, len(other))})
    assert found == Counts(len(want & got), len(got - want), len(want - got))


def folder(path: Path, score: dict[str, Any], code: str = "") -> Path:
    """A task that rewrites a query."""
    path.mkdir(exist_ok=True)
    properties = {"text": {"type": "string", "maxLength": 50}, "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["a", "b"]}}}
    answer = {"type": "object", "properties": properties, "required": ["text"], "additionalProperties": False}
    task = {"name": "rewrite", "answer": answer, "score": score, "fallback": {"text": "$query"}, "sampling": {"max_tokens": 64}}
    (path / "task.yaml").write_text(yaml.safe_dump(task))
    (path / "prompt.j2").write_text("{% block system %}Rewrite.{% endblock %}{% block user %}{{ query }}{% endblock %}")
    if code:
        (path / "my_score.py").write_text(code)
    return path


OWN = {"kind": "custom", "function": "my_score:compare", "least": 0.75}


def test_a_function_of_ones_own_scores_where_code_is_allowed(tmp_path: Path) -> None:
    code = "def compare(wanted, given):\n    return len(set(wanted['text']) & set(given['text'])) / 4\n"
    path = folder(tmp_path / "own", OWN, code)
    with pytest.raises(ConfigError, match="allow_task_code"):
        load_task(path)
    task = load_task(path, allow_code=True)
    assert task.score({"text": "abcd"}, {"text": "ab"}) == Counts(50, 50, 50)
    assert task.score({"text": "abcd"}, {"text": "abc"}).right, "from `least` on"
    assert task.score({"text": "abcd"}, None) == Counts(0, 0, 100)
    travelled: Task = pickle.loads(pickle.dumps(task))
    with pytest.raises(ConfigError, match="not loaded here"):
        travelled.score({"text": "a"}, {"text": "a"})
    folder(path, OWN, code.replace("/ 4", "/ 5"))
    changed = load_task(path, allow_code=True)
    assert changed.score_fingerprint != task.score_fingerprint, "the code decides the score"
    assert changed.fingerprint == task.fingerprint, "and no answer"


@pytest.mark.parametrize(
    "code, said", [("x = 1\n", "AttributeError"), ("raise SystemExit(0)\n", "SystemExit"), ("import nope_x\n", "nope_x")]
)
def test_code_that_cannot_be_used_is_an_error_of_the_config(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_task(folder(tmp_path / "own", OWN, code), allow_code=True)


def test_what_a_function_may_return() -> None:
    def measured(value: Any) -> Counts:
        return score_answer(ScoreConfig(kind="custom", function="a:b"), {}, {}, Measure(lambda wanted, given: value, "", "a:b"))

    assert measured((3, 1, 2)) == Counts(3, 1, 2)
    assert measured(0.999) == Counts(99, 1, 1), "not wholly right below `least`"
    assert measured(True).right
    for wrong in (1.5, -0.1, float("nan"), "x", (1, 2), (1, 2, -3)):
        with pytest.raises(InputError, match="neither a likeness nor counts"):
            measured(wrong)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        score_answer(ScoreConfig(kind="custom", function="a:b"), {}, {}, Measure(lambda wanted, given: 1 / 0, "", "a:b"))


@pytest.mark.parametrize(
    "score, said",
    [
        ({"kind": "set", "field": "text"}, "of another type"),
        ({"kind": "edit", "field": "tags"}, "of another type"),
        ({"kind": "edit", "field": "nothing"}, "score.field"),
        ({"kind": "custom", "function": "compare"}, "not module:function"),
        ({"kind": "semantic", "field": "text"}, "score.encoder is required"),
        ({"kind": "semantic", "field": "text", "encoder": "nowhere"}, "score.encoder"),
    ],
)
def test_a_score_must_fit_the_schema(tmp_path: Path, score: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_task(folder(tmp_path / "own", score))


@pytest.mark.parametrize("kind", ["absolute", "dots", "link", "file behind a link", "folder behind a link", "adapter"])
def test_an_encoder_outside_of_the_tasks_folder_is_not_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither opened nor given to transformers: its files might be anyone's."""
    outside, path = tmp_path / "outside", tmp_path / "own"
    name = {"absolute": str(outside), "dots": "../outside"}.get(kind, "enc")
    folder(path, {"kind": "semantic", "field": "text", "encoder": name})
    (outside / "deep").mkdir(parents=True)
    (outside / "config.json").write_text("{}")
    (path / "enc").mkdir()
    if kind == "link":
        (path / "enc").rmdir()
        (path / "enc").symlink_to(outside)
    elif kind == "file behind a link":
        (path / "enc" / "config.json").symlink_to(outside / "config.json")
    elif kind == "folder behind a link":
        (path / "enc" / "more").symlink_to(outside)
    elif kind == "adapter":
        (path / "enc" / "adapter_config.json").write_text('{"base_model_name_or_path": "/anywhere"}')
    read, read_bytes = list[str](), Path.read_bytes

    def note(file: Path) -> bytes:
        read.append(file.name)
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", note)
    monkeypatch.setattr("headtail.core.task._find_code", lambda *_: pytest.fail("given to transformers"))
    with pytest.raises(ConfigError, match=r"score\.encoder: (a file outside of the task's folder|an adapter)") as error:
        load_task(path)
    assert error.value.fix
    assert not {"config.json", "adapter_config.json"} & set(read)


def test_an_encoder_elsewhere_is_read_where_the_config_trusts_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    path = folder(tmp_path / "own", {"kind": "semantic", "field": "text", "encoder": str(outside)})
    monkeypatch.setattr("headtail.engines.similarity.encoder_similarity", lambda folder: lambda one, other: float(folder == str(outside)))
    assert load_task(path, allow_code=True).score({"text": "a"}, {"text": "b"}).right
    folder(path, {"kind": "semantic", "field": "text", "encoder": "../outside"})
    with pytest.raises(ConfigError, match="outside of the task's folder"):
        load_task(path, allow_code=True)


@pytest.mark.slow
def test_meaning_is_the_cosine_of_a_local_encoder(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = folder(tmp_path / "own", {"kind": "semantic", "field": "text", "encoder": "enc", "least": 0.99})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "thai", "food", "pizza", "near", "me"]
    (path / "enc").mkdir()
    (path / "enc" / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    model.save_pretrained(path / "enc")
    tokenizer = BertTokenizerFast(str(path / "enc" / "vocab.txt"))
    tokenizer.save_pretrained(path / "enc")
    task = load_task(path)
    assert task.score({"text": "Thai food"}, {"text": "thai food"}).right
    with torch.inference_mode():
        one, other = (model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in ("thai food", "pizza"))
    expected = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
    assert 0 < expected < 0.99
    assert task.score({"text": "thai food"}, {"text": "pizza"}).tp == round(100 * expected)
    before = task.score_fingerprint
    torch.manual_seed(1)
    BertModel(model.config).save_pretrained(path / "enc")
    assert load_task(path).score_fingerprint != before, "another encoder, another score"
