"""A student's I/O format: what it is asked and how its answer is read; and that a model without one is treated as ever."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from headtail.adapters.storage import Storage, put, write_json
from headtail.batch.job import answer_settings
from headtail.batch.parsed_answer import classify
from headtail.batch.shard_requests import shard_requests
from headtail.core import io_format
from headtail.core.errors import ConfigError, InputError
from headtail.core.io_format import DEFAULT, IOFormat, format_for, parse_format, read_format, write_format
from headtail.core.keys import answer_key, fingerprint
from headtail.core.receipt import Receipt
from headtail.core.rows import State
from headtail.core.task import Task, load_task
from headtail.engines import Completion, ModelConfig
from headtail.engines.models import find_model, resolve_weights, weights_digest
from headtail.stages.precompute.dry_run.preview import preview
from null_jobs import MakeJob, planned, run_here

QUERY_ONLY = IOFormat(prompt="query_only", output="compact")
ANSWER = {"segments": [{"text": "thai food", "label": "topic"}, {"text": "near me", "label": "location"}]}
CODE = "thai food|near me^"
QUERY = "thai food near me"

# --- a model without headtail.json: everything as it was


@pytest.mark.parametrize(
    "name, engine, side, settings, key",
    [  # recorded before there were I/O formats; again when control tokens became text, and when null settings left the key
        ("query_segmentation", "vllm", True, "5e7c632d5bd8ec921594dbb29886d7e0", "ad6f2d2858cf6024cfbdeb9c436391f8"),
        ("query_segmentation", "null", True, "585be7a5ae5ddc0be53c76183e523450", "c0c6dbc48a1a7c98e826026984c163fa"),
        ("query_intent", "vllm", False, "f52395ac4b6437cdc8b169a8ca285e63", "b025943205435761dcb565eae0a8dcba"),
        ("query_intent", "null", False, "f7825e5386b099b3c5f7272e81a03373", "7889cba62d062d3435f9291785f41eea"),
    ],
)
def test_keys_of_a_model_without_a_format_are_those_recorded(name: str, engine: str, side: bool, settings: str, key: str) -> None:
    task, model = load_task(name), ModelConfig.model_validate({"model": "example:teacher", "engine": engine})
    made = fingerprint(answer_settings(task, model, "d" * 64, DEFAULT))
    businesses = {"businesses": ["Thai House", "Siam"]} if side else {}
    messages = DEFAULT.messages(task, "thai food near me", businesses)
    assert (made, answer_key(messages, made).hex()) == (settings, key)
    assert messages == task.messages("thai food near me", businesses)


def test_the_default_format_is_no_format(segmentation: Task, tmp_path: Path) -> None:
    assert format_for(segmentation, IOFormat()) is DEFAULT
    assert format_for(segmentation, IOFormat(side_inputs=True)) is DEFAULT  # with the full prompt it says nothing
    write_format(DEFAULT, tmp_path)
    assert not list(tmp_path.iterdir())
    assert read_format(tmp_path) is DEFAULT
    assert (DEFAULT.settings, DEFAULT.chat_template) == ({}, None)
    assert DEFAULT.check(segmentation) is DEFAULT
    text = segmentation.target(ANSWER)
    assert DEFAULT.target(segmentation, ANSWER) == DEFAULT.as_json(segmentation, text, DEFAULT.parse_text(segmentation, text)) == text
    assert DEFAULT.parse_text(segmentation, text) == (*segmentation.parse(text), None)
    assert DEFAULT.as_json(segmentation, "no JSON", DEFAULT.parse_text(segmentation, "no JSON")) == "no JSON"
    assert DEFAULT.bound(segmentation, 120) == segmentation.schema


# --- what is kept beside the weights


def test_a_format_is_kept_and_pins_the_model(segmentation: Task, tmp_path: Path, store: Storage) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = weights_digest(tmp_path)
    assert resolve_weights(str(tmp_path), "", store).io_format is DEFAULT
    made = format_for(segmentation, QUERY_ONLY)
    write_format(made, tmp_path)
    assert read_format(tmp_path) == made == resolve_weights(str(tmp_path), "", store).io_format
    assert weights_digest(tmp_path) != before


def test_a_format_is_known_before_the_student_is_fetched(segmentation: Task, tmp_path: Path, store: Storage) -> None:
    """A job is keyed where it is planned, and that is not where the engine is."""
    made = format_for(segmentation, QUERY_ONLY)
    write_format(made, tmp_path)
    ref = put(store, tmp_path / io_format.FILE, f"distill/abc/model/{io_format.FILE}")
    receipt = Receipt(
        stage="distill",
        fingerprint="abc",
        path="distill/abc",
        started="",
        seconds=0,
        outputs={f"model/{io_format.FILE}": ref},
    )
    write_json(store, "distill/abc/receipt.json", receipt.model_dump(mode="json"))
    found = find_model(ModelConfig(model="distill/abc"), store, fetch=False)
    assert (found.path, found.io_format) == ("distill/abc", made)


def test_a_student_of_another_task_is_refused(segmentation: Task, intent: Task) -> None:
    made = format_for(segmentation, QUERY_ONLY)
    assert made.check(segmentation) is made
    with pytest.raises(ConfigError, match="made for query_segmentation, not for the task query_intent"):
        made.check(intent)
    changed = Task(segmentation.file, segmentation.folder, {**segmentation.schema, "required": []}, segmentation.template)
    with pytest.raises(ConfigError, match="another answer schema"):
        made.check(changed)
    with pytest.raises(ConfigError, match="version 99 of the compact format"):
        made.model_copy(update={"compact_version": 99}).check(segmentation)


@pytest.mark.parametrize(
    "text, says", [("{", "not JSON"), ("[]", "JSON object"), ('{"prompt": "bear"}', "prompt"), ('{"more": 1}', "more")]
)
def test_a_file_that_is_no_format_is_an_error(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_format(text.encode(), "headtail.json")


def test_a_task_whose_answers_have_no_compact_text_is_refused_when_the_format_is_made(segmentation: Task) -> None:
    loose = Task(segmentation.file, segmentation.folder, {"type": "object", "properties": {}}, "other")
    with pytest.raises(ConfigError, match="no compact format"):
        format_for(loose, QUERY_ONLY)


# --- asking


def test_a_bare_student_sees_the_query_alone(segmentation: Task) -> None:
    side = {"businesses": ["Thai House", "Siam"]}
    query_only, with_side = format_for(segmentation, QUERY_ONLY), format_for(segmentation, IOFormat(prompt="query_only", side_inputs=True))
    assert query_only.messages(segmentation, "thai", side) == [{"role": "user", "content": "thai"}]
    assert with_side.messages(segmentation, "thai", side) == [{"role": "user", "content": "thai\nThai House; Siam"}]
    nothing: Any
    for nothing in (None, {}, {"businesses": []}, {"businesses": None}):
        assert with_side.messages(segmentation, "thai", nothing) == query_only.messages(segmentation, "thai")


def test_a_bare_prompt_is_the_query_and_a_lines_end() -> None:
    import jinja2

    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        io_format.QUERY_ONLY_TEMPLATE
    )  # as transformers compiles it
    assert template.render(messages=[{"role": "user", "content": "thai\nSiam"}], add_generation_prompt=True) == "thai\nSiam\n"


def test_an_engines_own_version_is_part_of_the_key(segmentation: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the engine that runs this kind of student, and of no other; the grammar's is part of all that write."""
    formats = {kind: format_for(segmentation, IOFormat(prompt="query_only"), kind) for kind in ("decoder", "encoder", "seq2seq")}

    def settings() -> dict[str, str]:
        return {kind: fingerprint(answer_settings(segmentation, ModelConfig(), "d", fmt)) for kind, fmt in formats.items()}

    before = settings()
    assert len(set(before.values())) == 3
    parts = (("engines.open", {"decoder", "seq2seq"}), ("engines.encoder", {"encoder"}), ("engines.transformers", {"seq2seq"}))
    for part, kinds in parts:
        with monkeypatch.context() as patch:
            patch.setattr(f"headtail.{part}.VERSION", 99)
            assert {name for name, value in settings().items() if value != before[name]} == kinds


def test_rows_are_keyed_by_what_the_student_is_asked(segmentation: Task) -> None:
    """Without side inputs two rows that differ in nothing else are one; the settings keep I/O formats apart."""
    table = planned(["thai"] * 3, businesses=[["Siam"], None, ["Siam", "x"]])
    query_only = format_for(segmentation, QUERY_ONLY)
    assert [len(shard_requests(table, segmentation, "s", fmt)) for fmt in (DEFAULT, query_only)] == [3, 1]
    model = ModelConfig()
    formats = (
        DEFAULT,
        query_only,
        format_for(segmentation, IOFormat(prompt="query_only")),
        format_for(segmentation, IOFormat(output="compact")),
    )
    assert len({fingerprint(answer_settings(segmentation, model, "d", fmt)) for fmt in formats}) == 4


def test_a_changed_prompt_asks_a_bare_student_nothing_anew(make_local_job: MakeJob, segmentation: Task) -> None:
    """Its queries are asked without the template; and what set it apart from the job before is named."""
    table, query_only = planned(["thai", "pizza"], businesses=[["Siam"], None]), format_for(segmentation, IOFormat(prompt="query_only"))
    run_here(make_local_job(table, reuse=False))
    first = make_local_job(table, path="precompute/y", io_format=query_only)
    shown = preview(first, 0)
    assert {group.parts for group in shown.groups} == {("prompt", "io_format")}
    assert [change.part for change in shown.changes] == ["io_format"]
    ledger, _ = run_here(first)
    assert ledger.states[State.ANSWERED] == 2
    other = Task(segmentation.file, segmentation.folder, segmentation.schema, segmentation.template.replace("Query:", "Q:"))
    assert preview(make_local_job(table, path="precompute/z", io_format=query_only, task=other), 0).of("reused") == 2
    assert preview(make_local_job(table, path="precompute/w", task=other), 0).of("reused") == 0


# --- answering


def _spelled(code: str, *pieces: tuple[str, float], **fields: Any) -> Completion:
    texts, logprobs = tuple(text for text, _ in pieces), tuple(logprob for _, logprob in pieces)
    return Completion(0, code, "stop", tokens_out=len(pieces), token_texts=texts, token_logprobs=logprobs, **fields)


def test_a_compact_text_becomes_the_very_answer(segmentation: Task) -> None:
    query_only = format_for(segmentation, QUERY_ONLY)
    assert query_only.target(segmentation, ANSWER) == CODE
    assert query_only.parse_text(segmentation, CODE) == (ANSWER, "", [(0, 10), (10, 18)])
    parsed = classify(segmentation, Completion(0, CODE, "stop"), query_only)
    assert (parsed.state, parsed.answer, parsed.raw) == (State.ANSWERED, segmentation.dump(ANSWER), None)
    assert query_only.as_json(segmentation, CODE, query_only.parse_text(segmentation, CODE)) == segmentation.dump(ANSWER)
    with pytest.raises(InputError):
        query_only.target(segmentation, {"segments": [{"text": "x", "label": "dish"}]})


def test_an_encoder_writes_no_compact_text(segmentation: Task) -> None:
    with pytest.raises(ConfigError, match="an encoder writes no text that could be compact"):
        format_for(segmentation, QUERY_ONLY, "encoder")


@pytest.mark.parametrize(
    "code, finish, state, reason",
    [
        (CODE, "length", State.TRUNCATED, "length limit"),
        ("thai food", "stop", State.INVALID, "not in the compact format"),
        ('{"segments": []}', "stop", State.INVALID, "not in the compact format"),
        ("x|" * 9, "stop", State.INVALID, "9 items"),
        ("x" * 201 + "|", "stop", State.INVALID, "201 characters"),
        ("", "stop", State.ANSWERED, ""),
    ],
)
def test_nothing_is_repaired(segmentation: Task, code: str, finish: str, state: State, reason: str) -> None:
    query_only = format_for(segmentation, QUERY_ONLY)
    parsed = classify(segmentation, Completion(0, code, finish), query_only)
    assert parsed.state == state
    assert reason in parsed.reason
    assert state == State.ANSWERED or parsed.raw == (code or None)
    assert (query_only.as_json(segmentation, code, query_only.parse_text(segmentation, code)) == "") == (state == State.INVALID)


def test_bounds_of_numbers_are_still_the_schemas(tmp_path: Path) -> None:
    task = _task(tmp_path, {"n": {"type": "integer", "minimum": 0, "maximum": 5}}, {"n": 1})
    query_only = format_for(task, QUERY_ONLY)
    assert query_only.parse_text(task, "5").answer == {"n": 5}
    assert "schema" in query_only.parse_text(task, "6").problem


def test_confidence_is_over_the_decisions_of_a_compact_text(segmentation: Task, tmp_path: Path) -> None:
    query_only = format_for(segmentation, QUERY_ONLY)
    made = _spelled(CODE, ("thai", -0.1), (" food", -0.2), ("|", -0.3), ("near", -0.1), (" me", -0.2), ("^", -0.3), ("", -9.0))
    assert classify(segmentation, made, query_only).confidence == pytest.approx(
        math.exp(-0.2)
    )  # that no segment follows is not counted in JSON either
    glued = _spelled(CODE, ("thai food|near", -0.4), (" me^", -0.2))
    assert classify(segmentation, glued, query_only).confidence == pytest.approx(math.exp(-0.3))
    assert classify(segmentation, _spelled("", ("", -0.1)), query_only).confidence is None
    text = _task(
        tmp_path,
        {"all": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}, "t": {"type": "string", "maxLength": 9}},
        {"all": [], "t": ""},
    )
    open_end = _spelled("|\thi", ("|", -0.3), ("\t", -9.0), ("hi", -0.1), ("", -0.2))  # here the answer's end is the text's
    assert classify(text, open_end, format_for(text, QUERY_ONLY)).confidence == pytest.approx(math.exp(-0.2))


def test_samples_vote_by_what_their_texts_say(segmentation: Task) -> None:
    query_only = format_for(segmentation, QUERY_ONLY)
    parsed = classify(
        segmentation, _spelled("x~", ("x~", -1.0), samples=(_spelled("x|", ("x|", -0.5)), _spelled("x|", ("x|", -0.1)))), query_only
    )
    assert json.loads(parsed.answer or "") == {"segments": [{"text": "x", "label": "topic"}]}
    assert parsed.agreement == pytest.approx(2 / 3)
    assert parsed.confidence == pytest.approx(math.exp(-0.5))


def _task(folder: Path, properties: dict[str, Any], fallback: dict[str, Any], **sampling: Any) -> Task:
    plain = {
        "name": "made_up",
        "answer": {"type": "object", "properties": properties, "required": list(fallback), "additionalProperties": False},
        "sampling": {"max_tokens": 96, **sampling},
        "score": {"kind": "exact"},
        "fallback": fallback,
    }
    (folder / "task.yaml").write_text(json.dumps(plain))
    (folder / "prompt.j2").write_text("{% block user %}{{ query }}{% endblock %}")
    return load_task(folder)
