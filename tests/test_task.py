"""Tasks as files: what is wrong in a task is said by file, field and value; what is right renders, parses and scores."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from headtail.errors import ConfigError
from headtail.keys import canonical
from headtail.task import EXAMPLES, Task, load_task

GOOD: dict[str, Any] = {
    "name": "mine",
    "answer": {"type": "object", "properties": {"intent": {"enum": ["a", "b"]}}, "required": ["intent"]},
    "score": {"kind": "label", "field": "intent"},
    "fallback": {"intent": "a"},
}
PROMPT = "{% block user %}Query: {{ query }}{% endblock %}"


def write(folder: Path, prompt: str | None = PROMPT, **changes: Any) -> Path:
    data = {**GOOD, **changes}
    (folder / "task.yaml").write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not ...}))
    if prompt is not None:
        (folder / "prompt.j2").write_text(prompt)
    return folder


@pytest.mark.parametrize("name", [p.name for p in EXAMPLES.iterdir() if p.is_dir()])
def test_shipped_examples_load(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.parse(task.dump(task.fallback("pizza")))[1] == ""


def test_messages_put_the_shared_part_first(segmentation: Task) -> None:
    one = segmentation.messages("pizza", {"businesses": ["blue fox", "red owl"]})
    two = segmentation.messages("sushi")
    assert [m["role"] for m in one] == ["system", "user"]
    assert one[0] == two[0]
    assert one[1]["content"] == "Businesses viewed: blue fox; red owl\nQuery: pizza"
    assert two[1]["content"] == "Query: sushi"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"name": "Bad Name"}, "field name"),
        ({"sampling": {"temprature": 1}}, "unknown field sampling.temprature .*did you mean temperature"),
        ({"answer": {"type": "strin"}}, "not a JSON Schema"),
        ({"answer": {"type": "object", "properties": {"t": {"type": "string"}}}}, "answer.t: text needs maxLength"),
        ({"answer": {"type": "object", "properties": {"t": {"type": "array", "items": {"enum": [1]}}}}}, "answer.t: .*maxItems"),
        ({"answer": "no_such_module:Model"}, "field answer: .*no_such_module"),
        ({"answer": "json:dumps"}, "not a pydantic model"),
        ({"score": {"kind": "span"}}, "field score.kind"),
        ({"fallback": {"intent": "c"}}, "fallback: not a valid answer"),
        ({"fallback": ...}, "field fallback is required"),
        ({"side_inputs": ["query"]}, "name is taken"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_task(write(tmp_path, **changes))
    assert "task.yaml" in error.value.where


@pytest.mark.parametrize(
    "prompt, said",
    [
        (None, "template not found"),
        ("Query: {{ query }}", "needs a block `user`"),
        ("{% block user %}no query{% endblock %}", "needs a block `user`"),
        ("{% block user %}{{ query }} {{ busineses }}{% endblock %}", "busineses"),
        ("{% block user %}{{ query ", "prompt template"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, prompt: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_task(write(tmp_path, prompt))


def test_no_task_here_lists_the_examples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_task(tmp_path)
    assert "query_segmentation" in error.value.fix


def test_schema_from_a_pydantic_model_beside_the_task(tmp_path: Path) -> None:
    (tmp_path / "my_answer.py").write_text(
        "from typing import Literal\nfrom pydantic import BaseModel\nclass Answer(BaseModel):\n    intent: Literal['a', 'b']\n"
    )
    task = load_task(write(tmp_path, answer="my_answer:Answer"))
    assert task.parse('{"intent": "b"}') == ({"intent": "b"}, "")
    assert task.parse('{"intent": "z"}')[1].startswith("schema: intent")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"segments": []',
        '```json\n{"segments": []}\n```',
        '{"segments": [{"text": "a"}]}',
        '{"segments": [], "more": 1}',
        "[" * 100_000,
    ],
)
def test_nothing_is_repaired(segmentation: Task, text: str) -> None:
    answer, reason = segmentation.parse(text)
    assert answer is None
    assert reason


@given(st.lists(st.tuples(st.text(max_size=20), st.sampled_from(["topic", "name", "none"])), max_size=8))
def test_target_and_dump_round_trip(pairs: list[tuple[str, str]]) -> None:
    task = load_task("query_segmentation")
    answer = {"segments": [{"label": label, "text": text} for text, label in pairs]}
    assert task.parse(task.target(answer)) == (answer, "")
    assert task.parse(task.dump(answer)) == (answer, "")


def test_target_has_the_order_and_blanks_that_the_grammar_forces(segmentation: Task) -> None:
    answer = {"segments": [{"label": "topic", "text": "caf\u00e9"}]}
    assert segmentation.target(answer) == '{"segments": [{"text": "caf\u00e9", "label": "topic"}]}'


def test_fingerprint_covers_what_changes_an_answer_and_no_more(tmp_path: Path) -> None:
    def made(name: str, **changes: Any) -> Task:
        (tmp_path / name).mkdir()
        return load_task(write(tmp_path / name, **changes))

    base = made("base")
    same = [
        made("d", description="other"),
        made("v", version=2),
        made("s", score={"kind": "exact"}),
        made("t", strata={"torso_min_count": 9}),
    ]
    other = [
        made("p", prompt=PROMPT + " "),
        made("m", sampling={"max_tokens": 7}),
        made("a", answer={**GOOD["answer"], "title": "x"}),
        made("i", side_inputs=["b"]),
    ]
    assert {t.fingerprint for t in same} == {base.fingerprint}
    assert len({t.fingerprint for t in [base, *other]}) == 5
    assert made("s2", score={"kind": "exact"}).score_fingerprint != base.score_fingerprint


def test_pickles_to_workers(segmentation: Task) -> None:
    again = pickle.loads(pickle.dumps(segmentation))
    assert again.messages("x") == segmentation.messages("x")
    assert again.fingerprint == segmentation.fingerprint


def test_fallback_carries_the_query(segmentation: Task) -> None:
    assert json.loads(segmentation.dump(segmentation.fallback("pizza"))) == {"segments": [{"label": "topic", "text": "pizza"}]}


_KEYS = st.sampled_from(["text", "label", "other"])
_SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["", "topic", "name", "é" * 9, "x" * 201])
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=8)
_SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"text": {"type": "string", "maxLength": 8}, "label": {"enum": ["topic", 1]}}, "required": ["text"]},
    {"type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2, "$defs": {"one": {"type": ["integer", "null"], "minimum": 0}}},
    {"anyOf": [{"type": "number", "exclusiveMaximum": 1}, {"type": "object", "additionalProperties": False, "properties": {"text": {}}}]},
]


@given(answer=_VALUES, schema=st.sampled_from(_SCHEMAS))
def test_valid_is_what_the_reference_validator_calls_valid(segmentation: Task, answer: Any, schema: dict[str, Any]) -> None:
    task = dataclasses.replace(segmentation, schema=schema)
    found, problem = task.parse(json.dumps(answer))
    assert (problem == "") == jsonschema.Draft202012Validator(schema).is_valid(answer)
    assert found == (answer if problem == "" else None)


@given(answer=_VALUES)
def test_the_stored_form_is_the_canonical_one(segmentation: Task, answer: Any) -> None:
    assert segmentation.dump(answer) == canonical(answer)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e999", "[-1e999]", r'{"intent": "\ud800"}'])
def test_what_json_does_not_have_is_no_answer(segmentation: Task, text: str) -> None:
    assert dataclasses.replace(segmentation, schema={}).parse(text)[1].startswith("not JSON")


def test_a_block_without_variables_is_rendered_once_and_others_each_time(segmentation: Task) -> None:
    template = "{% block system %}A{% if true %}B{% endif %}{% endblock %}{% block user %}{{ query }}{% endblock %}"
    task = dataclasses.replace(segmentation, template=template)
    assert task._constant == {"system": "AB"}
    assert [m["content"] for m in task.messages("x")] == ["AB", "x"]
    moody = dataclasses.replace(segmentation, template=template.replace("A{%", "{{ query }}{%"))
    assert moody._constant == {}
    assert [[m["content"] for m in moody.messages(q)] for q in "xy"] == [["xB", "x"], ["yB", "y"]]
    random = dataclasses.replace(segmentation, template=template.replace("A{%", "{{ range(9) | random }}{%"))
    assert random._constant == {}
