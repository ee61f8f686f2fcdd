"""Engines: the null engine, grammars, prompts made into ids ahead, an engine in a thread of its own, and how full an engine was."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headtail.adapters.storage import Storage
from headtail.core.errors import ConfigError
from headtail.core.task import Task, load_task
from headtail.engines import Request, base, grammar
from headtail.engines.base import ENGINES, EngineTraits, ModelConfig
from headtail.engines.control import Encoder
from headtail.engines.engine_thread import EngineStopped, EngineThread, RowRefused
from headtail.engines.load import Load
from headtail.engines.models import find_model
from headtail.engines.null import NullEngine, _fit_length, _smallest, answerer
from headtail.engines.tokens import AHEAD, BATCH, TokenizeAhead, answer_texts
from headtail.engines.vllm import completion_of_output
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
        anew = _smallest(schema, schema, lambda least, most: _fit_length(text, least, most))  # noqa: B023
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
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(grammar.schema_grammar(schema, "here"))
    matcher = xgrammar.GrammarMatcher(compiled)
    return all(matcher.accept_token(byte) for byte in text.encode()) and bool(matcher.accept_token(256))


_TEXT = st.text(max_size=40)
_SEGMENT = st.fixed_dictionaries({"text": _TEXT, "label": st.sampled_from(["topic", "name", "location", "time", "question", "none"])})


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_SEGMENT, max_size=8))
def test_whatever_is_taught_the_grammar_lets_pass(segments: list[dict[str, str]]) -> None:
    task = load_task("query_segmentation")
    schema = grammar.engine_schema(task.schema, task.file.sampling.max_tokens)
    assert _accepts(schema, task.target({"segments": segments}))


def test_the_grammar_forces_one_spacing_and_the_schemas_order(segmentation: Task) -> None:
    schema = grammar.engine_schema(segmentation.schema, 120)
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


@pytest.mark.parametrize(
    "label", ["é0", "ÿf", "\x80a", "caf\u00e9bar", "\u200d9", "日本1", "😀a", 'a"b', "back\\xe90", "{1, 2}", "root ::= x", "[a]"]
)
def test_a_label_of_any_characters_passes_and_no_other(label: str) -> None:
    schema = {"type": "object", "properties": {"é0": {"enum": [label]}}, "required": ["é0"], "additionalProperties": False}
    assert _accepts(schema, json.dumps({"é0": label}, ensure_ascii=False))
    assert not _accepts(schema, json.dumps({"é0": label + "0"}, ensure_ascii=False))
    assert not _accepts(schema, json.dumps({"é": label}, ensure_ascii=False))


def test_intents_pass(intent: Task) -> None:
    for label in intent.schema["properties"]["intent"]["enum"]:
        assert _accepts(grammar.engine_schema(intent.schema, 24), intent.target({"intent": label}))


def test_a_bound_that_the_token_limit_implies_goes_and_a_tighter_one_stays() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "wide": {"type": "string", "maxLength": 200, "minLength": 1},
            "tight": {"type": "string", "maxLength": 5},
            "kind": {"enum": [{"type": "string", "maxLength": 500}]},
        },
    }
    made = grammar.engine_schema(schema, 120)
    assert made["properties"]["wide"] == {"type": "string"}
    assert made["properties"]["tight"] == schema["properties"]["tight"]
    assert made["properties"]["kind"] == schema["properties"]["kind"]
    assert schema["properties"]["wide"]["maxLength"] == 200  # the task's own schema, by which answers are judged, is untouched


def test_a_schema_that_is_no_grammar_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot be turned into a grammar"):
        grammar.schema_grammar({"type": "string", "pattern": "["}, "task.yaml answer")


# --- prompts made into ids ahead


@pytest.fixture(scope="module")
def tokenizer(teacher_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher_path)


def test_ids_made_in_batches_are_those_made_one_by_one(tokenizer: Any, segmentation: Task) -> None:
    queries = ["thai food", "x" * 300, "", 'a "quoted" \\ thing', "größe 中文 🍕", *(f"pizza {i}" for i in range(150))]
    chats = [segmentation.messages(query, {"businesses": ["a & b"]} if i % 2 else None) for i, query in enumerate(queries)]
    alone = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False) for chat in chats]
    with TokenizeAhead(Encoder(tokenizer), (Request(i, chat) for i, chat in enumerate(chats))) as ahead:
        found = []
        while ahead.more:
            if made := ahead.take(wait=True):
                found.append(made)
    assert [(request.id, ids, problem) for request, ids, problem in found] == [(i, ids, "") for i, ids in enumerate(alone)]
    assert ahead.take(wait=True) is None


def test_a_row_that_the_template_refuses_is_the_only_one_that_lacks_ids(tokenizer: Any, segmentation: Task) -> None:
    asked = [Request(i, segmentation.messages(f"query {i}")) for i in range(10)]
    asked[3] = Request(3, [{"nonsense": "x"}])
    with TokenizeAhead(Encoder(tokenizer), asked) as ahead:
        found = [made for _ in range(10) if (made := ahead.take(wait=True))]
    assert [bool(problem) for _, _, problem in found] == [i == 3 for i in range(10)]
    assert [bool(ids) for _, ids, _ in found] == [i != 3 for i in range(10)]


def test_rows_are_not_pulled_far_ahead(tokenizer: Any, segmentation: Task) -> None:
    pulled: list[int] = []

    def source() -> Iterator[Request]:
        for i in range(5000):
            pulled.append(i)
            yield Request(i, segmentation.messages("x"))

    with TokenizeAhead(Encoder(tokenizer), source()) as ahead:
        ahead.take(wait=True)
        assert len(pulled) <= (AHEAD + 1) * BATCH


# --- what vLLM says of a row


def said(*ids: int, reason: str | None = None) -> Any:
    """A sample in a RequestOutput."""
    flat = SimpleNamespace(token_ids=list(ids), logprobs=[-0.25] * len(ids))
    return SimpleNamespace(token_ids=list(ids), logprobs=flat, finish_reason=reason)


def output(*samples: Any, tokens_in: int = 3, cached: int = 0) -> Any:
    return SimpleNamespace(outputs=list(samples), prompt_token_ids=[1] * tokens_in, num_cached_tokens=cached)


def test_a_row_is_its_samples_and_the_first_is_the_answer(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    one, two = tokenizer("thai", add_special_tokens=False)["input_ids"], tokenizer("food", add_special_tokens=False)["input_ids"]
    made = completion_of_output(7, output(said(*one, reason="length"), said(*two, end, reason="stop"), tokens_in=40, cached=16), tokenizer)
    assert (made.id, made.text, made.finish_reason, made.error) == (7, "thai", "length", "")
    assert (made.tokens_in, made.tokens_cached, made.tokens_out) == (40, 16, len(one))
    (sample,) = made.samples
    assert (sample.text, sample.finish_reason) == ("food", "stop")
    assert (sample.tokens_in, sample.tokens_cached, sample.tokens_out) == (0, 0, len(two) + 1)
    assert len(sample.token_texts) == len(sample.token_logprobs) == sample.tokens_out
    assert sample.token_logprobs[0] == -0.25


def test_a_token_that_ends_an_answer_is_no_part_of_it_even_when_it_is_plain_text(tokenizer: Any) -> None:
    (end,) = tokenizer("!", add_special_tokens=False)["input_ids"]
    ids = tokenizer("ok", add_special_tokens=False)["input_ids"]
    assert completion_of_output(1, output(said(*ids, end, reason="stop")), tokenizer).text == "ok"


def test_a_control_token_inside_an_answer_is_spelt_out(tokenizer: Any) -> None:
    """The grammar takes it for its text: left out, the answer would be another one."""
    ids = tokenizer("pizza", add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id]
    assert "".join(answer_texts(tokenizer, ids, stopped=True)) == "pizza<|user|>"


def test_what_an_engine_gives_up_is_to_be_asked_again(tokenizer: Any) -> None:
    made = completion_of_output(1, output(said(reason="abort")), tokenizer)
    assert "abort" in made.error
    assert made.transient


def test_rows_without_a_grammar_are_not_masked() -> None:
    import torch

    logits = torch.zeros((3, 40), dtype=torch.bfloat16)
    words = np.array([[0b101, 0], [-1, 1]], dtype=np.int32)
    grammar.apply_masks(logits, [2, 0], words)
    assert torch.isinf(logits).sum(dim=1).tolist() == [7, 0, 38]
    assert logits[2, [0, 2]].tolist() == [0, 0]
    assert logits[0, 32] == 0


# --- an engine in a thread of its own


class Steps:
    """LLMEngine's public methods: four rows together, each done after three steps; a prompt below 0 is refused; `breaks`: a step raises."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.threads: set[int] = set()
        self.aborted: list[str] = []
        self.go = threading.Event()
        self.breaks = False

    def add_request(self, name: str, prompt: int, params: str) -> None:
        self.threads.add(threading.get_ident())
        if prompt < 0:
            raise KeyError(f"{prompt} is refused under {params}")
        self.rows[name] = [prompt, 0]

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.aborted.append(name)
            self.rows.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.rows)

    def get_num_unfinished_requests(self) -> int:
        return len(self.rows)

    def step(self) -> list[Any]:
        self.threads.add(threading.get_ident())
        assert self.go.wait(limit(60))
        if self.breaks:
            raise OSError("no memory")
        for row in list(self.rows.values())[:4]:
            row[1] += 1
        done = [name for name, (_, steps) in self.rows.items() if steps == 3]
        return [SimpleNamespace(request_id=name, prompt=self.rows.pop(name)[0]) for name in done]


def test_an_engine_is_called_by_one_thread_and_gives_each_caller_its_own_row() -> None:
    steps = Steps()
    steps.go.set()
    engine = EngineThread(lambda: steps, slots=4, refusals=(KeyError,))
    with ThreadPoolExecutor(8) as callers:
        futures = list(callers.map(lambda i: engine.submit(i, "greedy"), range(200)))
    assert [future.result(limit(60)).prompt for future in futures] == list(range(200))
    with pytest.raises(RowRefused, match="-1 is refused under greedy"):
        engine.submit(-1, "greedy").result(limit(60))
    assert engine.submit(7, "greedy").result(limit(60)).prompt == 7
    assert len(steps.threads) == 1
    assert threading.get_ident() not in steps.threads
    assert engine.load.steps >= 150  # 200 rows of three steps, four together
    assert engine.load.figures()["occupancy"] <= 1
    engine.close()


def test_a_cancelled_row_is_taken_out_of_the_batch_and_a_closed_engine_ends_the_others() -> None:
    steps = Steps()
    engine = EngineThread(lambda: steps, slots=4, refusals=(KeyError,))
    first, second, third = (engine.submit(i, "greedy") for i in range(3))
    assert second.cancel()
    steps.go.set()
    assert (first.result(limit(60)).prompt, third.result(limit(60)).prompt) == (0, 2)
    assert steps.aborted in (["1"], [])  # [] when it was cancelled before it was put in
    assert not steps.rows
    steps.go.clear()
    left = engine.submit(9, "greedy")
    steps.go.set()
    engine.close()
    with suppress(EngineStopped):
        assert left.result(limit(60)).prompt == 9
    with pytest.raises(EngineStopped, match="closed"):
        engine.submit(10, "greedy").result(limit(60))


def test_an_engine_that_breaks_ends_all_its_rows_with_the_reason() -> None:
    steps = Steps()
    engine = EngineThread(lambda: steps, slots=4, refusals=(KeyError,))
    futures = [engine.submit(i, "greedy") for i in range(3)]
    steps.breaks = True
    steps.go.set()
    for future in (*futures, engine.submit(4, "greedy")):
        with pytest.raises(EngineStopped, match="OSError: no memory"):
            future.result(limit(60))
    assert engine.error is not None
    engine.close()


def test_an_engine_whose_process_is_killed_ends_all_its_rows_though_its_step_never_returns() -> None:
    core = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    steps = Steps()

    def start() -> Steps:
        core.start()
        return steps

    engine = EngineThread(start, slots=4, refusals=())
    assert engine.processes == [core]
    futures = [engine.submit(i, "greedy") for i in range(3)]
    core.kill()
    for future in (*futures, engine.submit(4, "greedy")):
        with pytest.raises(EngineStopped, match="died"):
            future.result(limit(60))
    steps.go.set()
    engine.close()
    core.join()


def test_an_engine_that_does_not_start_says_why() -> None:
    def start() -> Steps:
        raise ConfigError("no memory", where="here")

    with pytest.raises(ConfigError, match="no memory"):
        EngineThread(start, slots=4, refusals=())


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
    ends = time.monotonic() + limit(1 if release else 10)
    while Path(f"/proc/{child}").exists() and time.monotonic() < ends:
        time.sleep(0.02)
    assert Path(f"/proc/{child}").exists() is release
    if release:
        os.kill(child, signal.SIGKILL)


def engine_names(path: Path) -> list[int]:
    """Lines that compare a config's engine with a name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute)]
    texts = [(node.lineno, ast.unparse(part)) for node in compared if node.left.attr == "engine" for part in node.comparators]  # type: ignore[attr-defined]
    return [line for line, text in texts if any(repr(name) in text for name in ENGINES)]


def test_only_what_opens_engines_knows_them_by_name(tmp_path: Path) -> None:
    """Others ask for traits, so another engine is a name with its traits and a line in `open_engine` (CONTRIBUTING.md)."""
    package = Path(base.__file__).parent.parent
    found = {str(path.relative_to(package)): engine_names(path) for path in package.rglob("*.py")}
    assert {name for name, lines in found.items() if lines} == {"engines/open.py"}
    bad = tmp_path / "bad.py"
    bad.write_text("if model.engine in ('null', 'openai') or model.engine == x:\n    pass\n")
    assert engine_names(bad) == [1]


def test_an_engine_of_other_traits_is_found_by_them(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(engine="null", model="m", base_url="https://host.example/v1")
    assert find_model(config, store).digest == "null"
    monkeypatch.setitem(ENGINES, "null", EngineTraits(in_process=False, endpoint=True))
    assert find_model(config, store).digest == "endpoint:https://host.example/v1:m@"


@pytest.mark.parametrize("said", [{}, {"architectures": None}, {"architectures": []}])
def test_a_folder_that_does_not_name_its_class_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    """vLLM took Gemma 3 for an embedding model and missed weights of other names."""
    from headtail.engines.vllm import check_architecture

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", **said}))
    with pytest.raises(ConfigError, match="does not name its architecture"):
        check_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForCausalLM"]}))
    check_architecture(tmp_path)
