"""Engines: the null engine, grammars, prompts made into ids ahead, rows and samples under way, and how full an engine was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headtail.core.errors import ConfigError
from headtail.core.task import Task, load_task
from headtail.engines import Request, grammar
from headtail.engines.control import Encoder
from headtail.engines.flight import Flight
from headtail.engines.load import Load
from headtail.engines.null import NullEngine, _fitted, _smallest, answerer
from headtail.engines.tokens import AHEAD, BATCH, Ahead, answer_texts
from timescale import limit


def requests(*texts: str) -> list[Request]:
    return [Request(i, [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


# --- null


@pytest.mark.parametrize("name", ["query_segmentation", "query_intent"])
def test_null_answers_are_valid_and_echo_their_own_row(name: str) -> None:
    task = load_task(name)
    queries = ["thai food", 'a "quoted" \\ thing', "x" * 300, ""]
    asked = [Request(i, task.messages(query)) for i, query in enumerate(queries)]
    for completion in NullEngine(task.schema).generate(asked):
        answer, problem = task.parse(completion.text)
        assert problem == ""
        if name == "query_segmentation":
            text = answer["segments"][0]["text"]
            assert task.messages(queries[completion.id])[-1]["content"].endswith(text)


def test_null_takes_no_unknown_option() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        NullEngine(None, "null:speed=9")


@pytest.mark.parametrize("option", ["delay_us=-1", "delay_us=1.5", "start_s=x", "start_s=1.2.3", "faults=1", "log", "hang"])
def test_null_options_are_checked(option: str) -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        NullEngine(None, f"null:{option}")


@pytest.mark.parametrize("micros", [20, 300, 2500])
def test_null_takes_as_long_as_it_is_told_in_the_mean(micros: int) -> None:
    count = 60_000 // micros
    asked = requests(*["x"] * count)
    started = time.monotonic()
    assert sum(1 for _ in NullEngine(None, f"null:delay_us={micros}").generate(asked)) == count
    assert 0.05 <= time.monotonic() - started <= limit(0.2)


def test_null_gives_as_many_samples_as_asked(segmentation: Task) -> None:
    (made,) = NullEngine(segmentation.schema, "null", samples=3).generate(requests("thai food"))
    assert [sample.text for sample in made.samples] == [made.text] * 2
    assert (made.tokens_in, [sample.tokens_in for sample in made.samples]) == (2, [0, 0])


def test_null_what_is_made_once_is_what_is_made_anew() -> None:
    schema: dict[str, Any] = {
        "$defs": {"name": {"type": "string", "minLength": 3, "maxLength": 8}},
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/name"},
            "none": {"type": "string", "maxLength": 0},
            "list": {"type": "array", "minItems": 2, "items": {"type": "string", "maxLength": 5}},
            "n": {"type": "integer", "minimum": 4},
            "kind": {"enum": ["x", "y"]},
            "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        },
    }
    answer = answerer(schema)
    for text in ("", "ab", 'say "hi" \\ \n now', "é\x00ü free text \x00"):
        anew = _smallest(schema, schema, lambda least, most: _fitted(text, least, most))  # noqa: B023
        assert json.loads(answer(text)) == anew
    wanted = {"a": "cdefghij", "none": "", "list": ["fghij", "fghij"], "n": 4, "kind": "x", "maybe": False}
    assert json.loads(answer("abcdefghij")) == wanted


def test_null_answers_fit_tuples_and_limits_that_are_exclusive() -> None:
    schema = {"type": "array", "prefixItems": [{"enum": ["x"]}, {"type": "integer", "exclusiveMinimum": 4, "maximum": 9}], "items": False}
    assert json.loads(answerer(schema)("any")) == ["x", 5]


def test_null_faults_only_when_asked() -> None:
    assert [c.error for c in NullEngine(None, "null").generate(requests("!fail"))] == [""]
    assert [c.error for c in NullEngine(None, "null:faults").generate(requests("!fail"))] == ["told to fail"]


# --- the grammar and the text that students are taught to write


def _accepts(schema: dict[str, Any], text: str) -> bool:
    """Whether xgrammar, told what vLLM is told, lets this text pass, byte by byte, to the end."""
    import xgrammar

    vocabulary = [bytes([i]) for i in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)
    matcher = xgrammar.GrammarMatcher(compiled)
    return all(matcher.accept_token(byte) for byte in text.encode()) and bool(matcher.accept_token(256))


_TEXT = st.text(max_size=40)
_SEGMENT = st.fixed_dictionaries({"text": _TEXT, "label": st.sampled_from(["topic", "name", "location", "time", "question", "none"])})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_SEGMENT, max_size=8))
def test_whatever_is_taught_the_grammar_lets_pass(segments: list[dict[str, str]]) -> None:
    task = load_task("query_segmentation")
    schema = grammar.for_engine(task.schema, task.file.sampling.max_tokens)
    assert _accepts(schema, task.target({"segments": segments}))


def test_the_grammar_forces_one_spacing_and_the_schemas_order(segmentation: Task) -> None:
    schema = grammar.for_engine(segmentation.schema, 120)
    assert _accepts(schema, '{"segments": [{"text": "x", "label": "name"}, {"text": "y", "label": "none"}]}')
    for other in (
        '{"segments":[{"text":"x","label":"name"}]}',
        '{"segments": [{"label": "name", "text": "x"}]}',
        '{ "segments": []}',
        '{"segments": [] }',
        '{"segments": [{"text": "x", "label": "dish"}]}',
        '{"segments": [{"text": "a\tb", "label": "name"}]}',
        '{"segments": []}\n',
    ):
        assert not _accepts(schema, other)


def test_intents_pass(intent: Task) -> None:
    for label in intent.schema["properties"]["intent"]["enum"]:
        assert _accepts(grammar.for_engine(intent.schema, 24), intent.target({"intent": label}))


def test_a_bound_that_the_token_limit_implies_goes_and_a_tighter_one_stays() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "wide": {"type": "string", "maxLength": 200, "minLength": 1},
            "tight": {"type": "string", "maxLength": 5},
            "kind": {"enum": [{"type": "string", "maxLength": 500}]},
        },
    }
    made = grammar.for_engine(schema, 120)
    assert made["properties"]["wide"] == {"type": "string"}
    assert made["properties"]["tight"] == schema["properties"]["tight"]
    assert made["properties"]["kind"] == schema["properties"]["kind"]
    assert schema["properties"]["wide"]["maxLength"] == 200  # the task's own schema, by which answers are judged, is untouched


def test_a_schema_that_is_no_grammar_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot be turned into a grammar"):
        grammar.check({"type": "string", "pattern": "["}, "task.yaml answer")


# --- prompts made into ids ahead


@pytest.fixture(scope="module")
def tokenizer(teacher_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher_path)


def test_ids_made_in_batches_are_those_made_one_by_one(tokenizer: Any, segmentation: Task) -> None:
    queries = ["thai food", "x" * 300, "", 'a "quoted" \\ thing', "größe 中文 🍕", *(f"pizza {i}" for i in range(150))]
    chats = [segmentation.messages(query, {"businesses": ["a & b"]} if i % 2 else None) for i, query in enumerate(queries)]
    alone = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False) for chat in chats]
    with Ahead(Encoder(tokenizer), (Request(i, chat) for i, chat in enumerate(chats))) as ahead:
        found = []
        while ahead.more:
            if made := ahead.take(wait=True):
                found.append(made)
    assert [(request.id, ids, problem) for request, ids, problem in found] == [(i, ids, "") for i, ids in enumerate(alone)]
    assert ahead.take(wait=True) is None


def test_a_row_that_the_template_refuses_is_the_only_one_that_lacks_ids(tokenizer: Any, segmentation: Task) -> None:
    asked = [Request(i, segmentation.messages(f"query {i}")) for i in range(10)]
    asked[3] = Request(3, [{"nonsense": "x"}])
    with Ahead(Encoder(tokenizer), asked) as ahead:
        found = [made for _ in range(10) if (made := ahead.take(wait=True))]
    assert [bool(problem) for _, _, problem in found] == [i == 3 for i in range(10)]
    assert [bool(ids) for _, ids, _ in found] == [i != 3 for i in range(10)]


def test_rows_are_not_pulled_far_ahead(tokenizer: Any, segmentation: Task) -> None:
    pulled: list[int] = []

    def source() -> Iterator[Request]:
        for i in range(5000):
            pulled.append(i)
            yield Request(i, segmentation.messages("x"))

    with Ahead(Encoder(tokenizer), source()) as ahead:
        ahead.take(wait=True)
        assert len(pulled) <= (AHEAD + 1) * BATCH


# --- rows and samples under way


def said(name: str, *ids: int, reason: str | None = None, cached: int | None = None) -> Any:
    """What a core says of a sample after a step."""
    logprobs = SimpleNamespace(logprobs=np.full((len(ids), 1), -0.25, dtype=np.float32))
    stats = None if cached is None else SimpleNamespace(num_cached_tokens=cached)
    return SimpleNamespace(request_id=name, new_token_ids=list(ids), new_logprobs=logprobs, prefill_stats=stats, finish_reason=reason)


def test_a_row_is_whole_when_its_last_sample_is(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    one, two = tokenizer("thai", add_special_tokens=False)["input_ids"], tokenizer("food", add_special_tokens=False)["input_ids"]
    flight = Flight(tokenizer, samples=2, ends=frozenset({end}))
    first, second = flight.add(7, tokens_in=40)
    flight.add(8, tokens_in=9)
    assert (len(flight), 7 in flight, 9 in flight) == (4, True, False)
    assert not list(flight.take([said(second, *two, cached=32), said(first, *one, cached=16), said("gone/0", 1)]))
    assert not list(flight.take([said(second, end, reason="stop")]))
    (row,) = flight.take([said(first, reason="length")])
    made = flight.completion(row)
    assert (made.id, made.text, made.finish_reason, made.error) == (7, "thai", "length", "")
    assert (made.tokens_in, made.tokens_cached, made.tokens_out) == (40, 16, len(one))
    (sample,) = made.samples
    assert (sample.text, sample.finish_reason) == ("food", "stop")
    assert (sample.tokens_in, sample.tokens_cached, sample.tokens_out) == (0, 0, len(two) + 1)
    assert len(sample.token_texts) == len(sample.token_logprobs) == sample.tokens_out
    assert sample.token_logprobs[0] == -0.25
    assert (len(flight), 7 in flight) == (2, False)


def test_a_token_that_ends_an_answer_is_no_part_of_it_even_when_it_is_plain_text(tokenizer: Any) -> None:
    (end,) = tokenizer("!", add_special_tokens=False)["input_ids"]
    flight = Flight(tokenizer, samples=1, ends=frozenset({end}))
    (name,) = flight.add(1, 3)
    (row,) = flight.take([said(name, *tokenizer("ok", add_special_tokens=False)["input_ids"], end, reason="stop")])
    assert flight.completion(row).text == "ok"


def test_a_control_token_inside_an_answer_is_spelt_out(tokenizer: Any) -> None:
    """The grammar takes it for its text: left out, the answer would be another one."""
    ids = tokenizer("pizza", add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id]
    assert "".join(answer_texts(tokenizer, ids, stopped=True)) == "pizza<|user|>"


def test_what_an_engine_gives_up_is_to_be_asked_again(tokenizer: Any) -> None:
    flight = Flight(tokenizer, samples=1, ends=frozenset())
    (name,) = flight.add(1, 3)
    (row,) = flight.take([said(name, reason="abort")])
    made = flight.completion(row)
    assert "abort" in made.error
    assert made.transient


# --- how full an engine was


def test_occupancy_is_rows_over_places_weighted_by_time() -> None:
    load = Load(slots=100)
    load.step(rows=100, seconds=3.0, core_seconds=2.0, fed=True)
    load.step(rows=20, seconds=1.0, core_seconds=1.0, fed=False)
    load.row(prompt_tokens=50, cached_tokens=32)
    load.row(prompt_tokens=50, cached_tokens=0)
    assert load.figures() == {
        "steps": 2,
        "engine_rows": 2,
        "occupancy": 0.8,
        "occupancy_fed": 1.0,
        "core_share": 0.75,
        "prefix_hit_rate": 0.32,
    }
    assert Load(slots=4).figures()["occupancy"] == 0.0


# --- processes that would outlive their parent

_PARENT = """
import subprocess, sys, time
from headtail.engines.orphans import Guard
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
guard = Guard([child.pid])
if sys.argv[1] == "release":
    guard.release()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("release", [False, True])
def test_a_guarded_process_dies_with_its_parent_however_that_dies(release: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, "release" if release else "guard"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + (1 if release else 10)
    while Path(f"/proc/{child}").exists() and time.monotonic() < ends:
        time.sleep(0.02)
    assert Path(f"/proc/{child}").exists() is release
    if release:
        os.kill(child, signal.SIGKILL)
