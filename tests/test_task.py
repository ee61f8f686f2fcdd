"""Tasks as files: what is wrong in a task is said by file, field and value; what is right renders, parses and scores."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from headtail.core.config import StageConfig, TrackingConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import canonical
from headtail.core.task import EXAMPLES, Task, load_task
from headtail.engines.grammar import engine_schema, schema_grammar
from headtail.stages import ingest
from timescale import limit

GOOD: dict[str, Any] = {
    "name": "mine",
    "answer": {"type": "object", "properties": {"intent": {"enum": ["a", "b"]}}, "required": ["intent"]},
    "score": {"kind": "label", "field": "intent"},
    "fallback": {"intent": "a"},
}
PROMPT = "{% block user %}Query: {{ query }}{% endblock %}"
MODEL = """
from __future__ import annotations
from typing import Literal
from pydantic import BaseModel
class Answer(BaseModel):
    intent: Literal['a', 'b']
"""


def write(folder: Path, template: str | None = PROMPT, **changes: Any) -> Path:
    data = {**GOOD, **changes}
    (folder / "task.yaml").write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not ...}))
    if template is not None:
        (folder / "prompt.j2").write_text(template)
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
        (
            {"answer": {"type": "object", "properties": {"intent": {"enum": ["a", True]}}}},
            "answer.intent: an enum that mixes text with true",
        ),
        ({"answer": "json:dumps"}, "field answer names Python code"),
        ({"score": {"kind": "span"}}, "field score.kind"),
        ({"fallback": {"intent": "c"}}, "fallback: not a valid answer"),
        ({"fallback": ...}, "field fallback is required"),
        ({"side_inputs": ["query"]}, "name is taken"),
        ({"side_inputs": ["query_key"]}, "name is taken"),
        ({"side_inputs": ["shops", "shops"]}, "name is taken"),
        ({"input": "text", "side_inputs": ["text"]}, "name is taken"),
        ({"score": {"kind": "label", "field": "intnt"}}, "field score.field: not in the answer schema"),
        ({"score": {"kind": "label"}}, "field score.field: not in the answer schema"),
        ({"score": {"kind": "spans", "field": "intent"}}, "field score.field: not a list"),
        ({"prompt": "../prompt.j2"}, "outside of the task's folder"),
        ({"prompt": "/etc/hostname"}, "outside of the task's folder"),
        ({"prompt": "a/../../prompt.j2"}, "outside of the task's folder"),
        ({"prompt": ""}, "outside of the task's folder"),
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
        ("Query: {{ query }}", "line 1: text outside of the blocks"),
        ("{% block user %}no query{% endblock %}", "block `user` does not show {{ query }}"),
        ("{% block user %}{{ query }}{{ 1/0 }}{% endblock %}", "line 1: ZeroDivisionError"),
        ("{% block user %}{{ query }}{% if shops %}{{ shops + 1 }}{% endif %}{% endblock %}", "line 1: TypeError"),
        ("{% block user %}{{ query }}{% if not shops %}{{ 1/0 }}{% endif %}{% endblock %}", "line 1: ZeroDivisionError"),
        ("{% block user %}{{ query }} {{ busineses }}{% endblock %}", "busineses"),
        ("{% block user %}{{ query ", "prompt template"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, prompt: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_task(write(tmp_path, prompt, side_inputs=["shops"]))
    assert "prompt.j2" in error.value.where
    assert error.value.fix


def test_links_in_a_circle_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, template=None)
    (tmp_path / "prompt.j2").symlink_to(tmp_path / "prompt.j2")
    with pytest.raises(ConfigError, match="outside of the task's folder"):
        load_task(tmp_path)


@pytest.mark.parametrize("name", ["task.yaml", "prompt.j2", "mine.py"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    inside, outside = tmp_path / "task", tmp_path / name
    inside.mkdir()
    write(inside, answer="mine:Answer")
    (inside / "mine.py").write_text(MODEL)
    (inside / name).rename(outside)
    (inside / name).symlink_to(outside)
    with pytest.raises(ConfigError, match="outside of the task's folder"):
        load_task(inside, allow_code=True)


@pytest.mark.parametrize("place", ["not", "$defs"])
def test_a_schema_fetches_no_other_file_or_host(tmp_path: Path, place: str) -> None:
    """Also where no answer can reach it: a validator would open the file, or ask the host, while the task is loaded."""
    (tmp_path / "other.json").write_text('{"type": "integer"}')
    for uri in ((tmp_path / "other.json").as_uri(), "http://127.0.0.1:9/x.json"):
        ref = {"$ref": uri}
        write(tmp_path, answer={**GOOD["answer"], place: {"x": ref} if place == "$defs" else ref})
        with pytest.raises(ConfigError, match="outside of this schema"):
            load_task(tmp_path)
    task = dataclasses.replace(load_task("query_intent"), schema={"not": {"$ref": (tmp_path / "other.json").as_uri()}})
    with pytest.raises(ValueError, match="outside of this schema"):  # as a release would bring it
        task.parse('"a"')


def test_a_linked_folder_and_a_prompt_in_a_subfolder_are_read(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "texts").mkdir(parents=True)
    write(real, prompt="texts/first.j2")
    (real / "prompt.j2").rename(real / "texts" / "first.j2")
    (tmp_path / "linked").symlink_to(real)
    assert load_task(tmp_path / "linked").messages("x") == [{"role": "user", "content": "Query: x"}]


def test_no_task_here_lists_the_examples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_task(tmp_path)
    assert "query_segmentation" in error.value.fix


def test_schema_from_a_pydantic_model_beside_the_task(tmp_path: Path) -> None:
    (tmp_path / "my_answer.py").write_text(MODEL)
    task = load_task(write(tmp_path, answer="my_answer:Answer"), allow_code=True)
    assert task.parse('{"intent": "b"}') == ({"intent": "b"}, "")
    assert task.parse('{"intent": "z"}')[1].startswith("schema: intent")
    assert "my_answer" not in sys.modules


def test_code_does_not_run_unless_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "my_answer.py").write_text(f"{MODEL}\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    write(tmp_path, answer="my_answer:Answer")
    with pytest.raises(ConfigError, match="names Python code") as error:
        load_task(tmp_path)
    assert error.value.value == "my_answer:Answer"
    assert "allow_task_code" in error.value.fix
    assert not (tmp_path / "ran").exists()
    load_task(tmp_path, allow_code=True)
    assert (tmp_path / "ran").exists()


def test_modules_of_one_name_are_each_tasks_own_and_shadow_nothing(tmp_path: Path) -> None:
    """Task folders whose module is called like another's, and like one of the standard library."""
    before, path = sys.modules.get("json"), list(sys.path)
    for name, labels in (("one", ["a", "b"]), ("two", ["a", "c"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "json.py").write_text(MODEL.replace("['a', 'b']", str(labels)))
        task = load_task(write(tmp_path / name, answer="json:Answer"), allow_code=True)
        assert task.schema["properties"]["intent"]["enum"] == labels
    assert sys.modules.get("json") is before is json
    assert sys.path == path


@pytest.mark.parametrize(
    "name, code, said",
    [
        ("no_such_module:Model", "", "ModuleNotFoundError.*no_such_module"),
        ("mine:Gone", MODEL, "AttributeError"),
        ("mine:Answer", "raise OSError('a disk')", "OSError: a disk"),
        ("mine:Answer", "raise SystemExit(0)", "SystemExit: 0"),
        ("mine:Answer", "import sys; sys.exit()", "SystemExit"),
        ("mine:Answer", "class Own(BaseException): pass\nraise Own('x')", "Own: x"),
        (
            "mine:Answer",
            "import pydantic, typing\nclass Answer(pydantic.BaseModel): x: typing.Callable[[], int]",
            "JsonSchema",
        ),
        ("mine:Answer", "def (", "SyntaxError"),
        ("mine:Answer", "from beside import x", "ModuleNotFoundError.*beside"),
        ("json:dumps", "", "not a pydantic model"),
        ("../mine:Answer", MODEL, "outside of the task's folder"),
    ],
)
def test_bad_code_is_named(tmp_path: Path, name: str, code: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "beside.py").write_text("x = 1")
    with pytest.raises(ConfigError, match=said) as error:
        load_task(write(tmp_path, answer=name), allow_code=True)
    assert error.value.value in (name, f"{name.partition(':')[0]}.py")


NESTED = """
from __future__ import annotations
from typing import Annotated, Literal, Optional
from pydantic import BaseModel, Field

class Place(BaseModel):
    zip: Annotated[str, Field(max_length=9)]
    city: Optional[Annotated[str, Field(max_length=20)]] = None

class Answer(BaseModel):
    size: Literal["s", "l"] | None
    intent: Optional[Place]
    stars: Annotated[float, Field(ge=0, le=5)]
    pair: tuple[Literal["x"], bool]
    places: Annotated[list[Place], Field(max_length=2)] = []
"""


def test_what_pydantic_makes_of_nested_and_optional_models_works(tmp_path: Path) -> None:
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    (tmp_path / "mine.py").write_text(NESTED)
    place = {"city": "Rome", "zip": "00100"}
    answer = {"places": [place], "pair": ["x", True], "stars": 4.5, "intent": place, "size": None}
    task = load_task(write(tmp_path, answer="mine:Answer", fallback=answer), allow_code=True)
    wanted = (
        '{"size": null, "intent": {"zip": "00100", "city": "Rome"}, "stars": 4.5, "pair": ["x", true], '
        '"places": [{"zip": "00100", "city": "Rome"}]}'
    )
    assert task.target(answer) == wanted
    grammar = Grammar.from_ebnf(schema_grammar(engine_schema(task.schema, 12), "here"))
    assert _is_grammar_accept_string(grammar, wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"segments": []',
        '```json\n{"segments": []}\n```',
        '{"segments": [{"text": "a"}]}',
        '{"segments": [], "more": 1}',
        '{"segments": [], "segments": []}',
        '{"segments": [{"text": "a", "label": "name", "text": "b"}]}',
        "[" * 100_000,
    ],
)
def test_nothing_is_repaired(segmentation: Task, text: str) -> None:
    answer, reason = segmentation.parse(text)
    assert answer is None
    assert reason


@given(st.lists(st.tuples(st.text(max_size=20), st.sampled_from(["topic", "name", "none"])), max_size=8))
def test_target_and_dump_round_trip(segmentation: Task, pairs: list[tuple[str, str]]) -> None:
    task = segmentation
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
        made("p", template=PROMPT + " "),
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
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-2, 2).map(lambda x: round(x, 6))
    | st.sampled_from(["", "topic", "name", "é" * 9, "x" * 201])
)
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


def test_a_field_that_is_there_twice_is_no_answer(segmentation: Task) -> None:
    assert segmentation.parse('{"segments": [], "segments": []}') == (None, "not JSON: the field 'segments' occurs twice")


def test_a_number_that_no_grammar_writes_is_no_answer(segmentation: Task) -> None:
    task = dataclasses.replace(segmentation, schema={"type": "number", "minimum": 0, "maximum": 1})
    assert task.parse("0.123456") == (0.123456, "")
    assert task.parse("0.1234567") == (None, "not JSON: 0.1234567 has more than 6 decimals, which no grammar writes")


def test_no_valid_answer_has_no_target(segmentation: Task) -> None:
    with pytest.raises(InputError, match="no training text can be made"):
        segmentation.target({"segments": [{"text": "a"}]})


@pytest.mark.parametrize(
    "line, said",
    [
        ("labels: [yes, no]", 'YAML reads yes as true or false: write "yes" in quotes'),
        ("labels: [On]", "YAML reads On as true or false"),
        ("labels: [~]", "YAML reads ~ as null"),
        ("labels: [2026-11-01]", "YAML reads 2026-11-01 as a date"),
        ("labels: [007]", "YAML reads 007 as a number"),
        ("labels: [1_000]", "YAML reads 1_000 as a number"),
        ("labels: [12:30]", "YAML reads 12:30 as a number"),
        ("labels: [.inf]", "YAML reads .inf as a number"),
        ("labels: [1e5]", "YAML reads 1e5 as text and JSON as a number"),
        ("labels:", "YAML reads an empty value as null"),
        ("yes: x", "the name of a field is not text"),
        ("1: x", "the name of a field is not text"),
        ("labels: 1\nname: again", "the field name occurs twice"),
        ("labels: {a: 1, a: 2}", "the field a occurs twice"),
    ],
)
def test_what_yaml_would_read_as_something_else_is_said(tmp_path: Path, line: str, said: str) -> None:
    write(tmp_path)
    file = tmp_path / "task.yaml"
    lines = file.read_text().count("\n")
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        load_task(tmp_path)
    assert f"line {lines + 1 + line.count(chr(10))}: " in str(error.value)


def test_values_as_json_has_them_and_quoted_ones_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "task.yaml"
    file.write_text(re.sub(r"enum:\n +- a\n +- b", "enum: [a, 'no', \"007\", null, 2026 november]", file.read_text()))
    assert load_task(tmp_path).schema["properties"]["intent"]["enum"] == ["a", "no", "007", None, "2026 november"]


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e999", "[-1e999]", r'{"intent": "\ud800"}'])
def test_what_json_does_not_have_is_no_answer(segmentation: Task, text: str) -> None:
    assert dataclasses.replace(segmentation, schema={}).parse(text)[1].startswith("not JSON")


def test_what_a_person_should_know_is_noted(tmp_path: Path, segmentation: Task) -> None:
    assert segmentation.notes == ()
    text = {"type": "string", "maxLength": 20, "pattern": "^a"}
    task = load_task(write(tmp_path, answer={"type": "object", "properties": {"intent": text}}, sampling={"max_tokens": 64}))
    assert task.notes == (
        "task mine: answer.intent: no grammar holds pattern; an answer that breaks it is `invalid`",
        "task mine: text with maxLength below max_tokens (64) has no quote, backslash or line break under a grammar",
    )
    short = load_task(
        write(
            tmp_path, answer={"type": "object", "properties": {"intent": {"type": "string", "maxLength": 99}}}, sampling={"max_tokens": 6}
        )
    )
    assert short.notes == ("task mine: the longest answer has 113 characters: max_tokens (6) ends it before, as `truncated`",)


AT_A_WORKER = """
import pickle, sys
task = pickle.load(sys.stdin.buffer)
assert task.parse(task.target({"intent": "b"})) == ({"intent": "b"}, "")
print(task.messages("pizza")[0]["content"], [name for name in sys.modules if "mine" in name or "_headtail_task" in name])
"""


def test_a_task_with_code_travels_to_a_worker_by_content(tmp_path: Path) -> None:
    """As Ray sends it: another process, without the folder and without running the code."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.py").write_text(MODEL)
    task = load_task(write(tmp_path / "task", answer="mine:Answer"), allow_code=True)
    assert task.target({"intent": "a"})  # its writer, validator and template stay behind
    sent = pickle.dumps(task)
    shutil.rmtree(tmp_path / "task")
    found = subprocess.run([sys.executable, "-c", AT_A_WORKER], input=sent, capture_output=True, cwd=tmp_path, timeout=limit(60))
    assert found.stdout.decode().strip() == "Query: pizza []", found.stderr.decode()


def test_every_stage_asks_its_config_whether_code_may_run(root: str, tmp_path: Path) -> None:
    package = EXAMPLES.parent.parent
    calls = [
        line.strip() for path in package.rglob("*.py") for line in path.read_text().splitlines() if re.search(r"[^_]load_task\(", line)
    ]
    own = [call for call in calls if "allow_task_code" not in call and not call.startswith(("def ", "tasks = map", "for task in map"))]
    assert own == ['distill.TrainingSet(task=task, training_set=f"{source.path}:train_{load_task(task).name}", rows=n)']  # a shipped one
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "log.csv").write_text("query\npizza\n")
    write(tmp_path, answer="mine:Answer")
    config = ingest.Config(root=root, tracking=TrackingConfig(enabled=False), task=str(tmp_path), log=str(tmp_path / "log.csv"))
    with pytest.raises(ConfigError, match="names Python code"):
        ingest.run(config)
    job = StageConfig(root=root, allow_task_code=True)
    assert ingest.run(config.at(job, config.tracking)).rows


def test_a_system_block_that_differs_by_row_is_noted_and_a_nul_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    prompt = tmp_path / "prompt.j2"
    prompt.write_text("{% block system %}About {{ query }}{% endblock %}{% block user %}{{ query }}{% endblock %}")
    assert [note for note in load_task(tmp_path).notes if "block `system` differs from row to row" in note]
    prompt.write_text("{% block user %}\n{{ query }}\0{% endblock %}")
    with pytest.raises(ConfigError, match="line 2: a NUL character"):
        load_task(tmp_path)
