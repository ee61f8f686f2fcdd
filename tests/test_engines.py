"""Engines: null, OpenAI-compatible HTTP against a server that misbehaves on purpose, grammars, and real vLLM on the CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headtail.engines import Request, grammar
from headtail.engines.null import NullEngine
from headtail.errors import ConfigError
from headtail.task import Task, load_task

SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 120, "seed": None}


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
