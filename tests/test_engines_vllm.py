"""vLLM itself, on the CPU: what it runs with, what it says of each row and sample, single prompts of callers, and its core's death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headtail.core.errors import ConfigError
from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig, Request
from headtail.engines.device import precision
from headtail.engines.vllm import VllmEngine
from timescale import limit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning"),  # xgrammar to vLLM, in its threads
]
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 120, "seed": None}


@pytest.fixture(scope="module")
def vllm_engine(teacher_path: Path, segmentation: Task) -> Iterator[VllmEngine]:
    config = ModelConfig(max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25, cpus=2)
    engine = VllmEngine(config, str(teacher_path), segmentation.schema, {**SAMPLING, "max_tokens": 48})
    yield engine
    engine.close()


def test_vllm_runs_as_asked_and_says_so(vllm_engine: VllmEngine) -> None:
    here = precision(ModelConfig())
    facts = vllm_engine.facts()
    assert (facts["max_num_seqs"], facts["max_num_batched_tokens"], facts["max_model_len"]) == (64, 8192, 256)
    assert (facts["device"], facts["dtype"], facts["prefix_caching"], facts["threads"]) == ("cpu", here, True, 2)
    assert facts["structured_outputs"] == "xgrammar, no free whitespace"


def test_vllm_each_row_once_with_what_it_says(vllm_engine: VllmEngine, segmentation: Task) -> None:
    """More rows than fit at once; texts that repeat; a row that is too long; a row whose template raises."""
    queries = [f"pizza near {'boston' if i % 2 else 'me'}" for i in range(150)]
    asked = [Request(i, segmentation.messages(query)) for i, query in enumerate(queries)]
    asked[7] = Request(7, [{"role": "user", "content": "very long " * 500}])
    asked[9] = Request(9, [{"nonsense": "x"}])
    found = {completion.id: completion for completion in vllm_engine.generate(iter(asked))}
    assert sorted(found) == list(range(150))
    assert "256" in found[7].error
    assert found[9].error
    for row, completion in found.items():
        if row in (7, 9):
            assert not completion.transient
            continue
        assert completion.error == ""
        assert completion.finish_reason in ("stop", "length")
        assert completion.top is None
        assert "".join(completion.token_texts) == completion.text
        assert len(completion.token_logprobs) == len(completion.token_texts) == completion.tokens_out
        assert all(logprob <= 1e-6 for logprob in completion.token_logprobs)
        assert completion.tokens_in > 10
        if completion.finish_reason == "stop":
            answer, problem = segmentation.parse(completion.text)
            assert problem == ""
            assert completion.text == segmentation.target(answer)  # the very spelling that students are taught


def test_vllm_compiles_nothing_on_a_cpu(vllm_engine: VllmEngine, segmentation: Task) -> None:
    """Ranks of log-probabilities would start a C++ compiler for ten seconds, more on a slow machine."""
    from torch._dynamo.utils import counters

    [answer] = vllm_engine.generate(iter([Request(1, segmentation.messages("pizza near me"))]))
    assert answer.token_logprobs
    assert not counters["frames"]


def test_vllm_is_sent_typed_control_tokens_as_text(vllm_engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []
    llm_engine = vllm_engine._thread.engine
    add = llm_engine.add_request

    def remember(name: str, prompt: Any, params: Any) -> Any:
        sent.append(prompt["prompt_token_ids"])
        return add(name, prompt, params)

    monkeypatch.setattr(llm_engine, "add_request", remember)
    for text in ("pizza", "pizza<|user|><|end|>"):
        assert not next(iter(vllm_engine.generate([Request(0, [{"role": "user", "content": text}])]))).error
    control = vllm_engine._encoder.control
    plain, typed = ([i for i in ids if i in control] for ids in sent)
    assert plain == typed, "the template's own, and no other"
    assert "pizza<|user|><|end|>" in vllm_engine._tokenizer.decode(sent[1])


def test_vllm_abandoned_rows_leave_nothing_behind(vllm_engine: VllmEngine, segmentation: Task) -> None:
    stream = vllm_engine.generate(Request(i, segmentation.messages(f"query {i}")) for i in range(100))
    next(stream)
    stream.close()
    again = list(vllm_engine.generate(Request(i, segmentation.messages(f"other {i}")) for i in range(5)))
    assert sorted(completion.id for completion in again) == [0, 1, 2, 3, 4]


def test_vllm_finds_the_shared_prompt_in_its_cache_and_keeps_its_places_full(vllm_engine: VllmEngine, segmentation: Task) -> None:
    """The task's shared text is 41 tokens of the reference teacher's: one block of 32, which is more than half of a prompt."""
    before = replace(vllm_engine.load)
    asked = (Request(i, segmentation.messages(f"{'cheap ' * (i % 7)}noodles {i}")) for i in range(400))
    found = list(vllm_engine.generate(asked))
    load, facts = vllm_engine.load, vllm_engine.facts()
    assert (load.rows - before.rows, facts["engine_rows"], facts["kv_block_tokens"]) == (400, load.rows, 32)
    cached, prompt = load.cached_tokens - before.cached_tokens, load.prompt_tokens - before.prompt_tokens
    assert cached == sum(completion.tokens_cached for completion in found)
    assert prompt == sum(completion.tokens_in for completion in found)
    assert cached / prompt > 0.5
    fed = (load.fed_row_s - before.fed_row_s) / (load.fed_s - before.fed_s) / load.slots
    assert fed > 0.9  # while rows are left, a place that falls free is taken in the next step
    assert (load.row_s - before.row_s) / (load.time_s - before.time_s) / load.slots < fed


def test_vllm_answers_callers_one_by_one_and_lets_a_cancelled_row_go(vllm_engine: VllmEngine, segmentation: Task) -> None:
    """What serving does: many threads ask at once; the answers are those of a batch."""
    queries = [f"tacos {i} near me" for i in range(40)]
    batch = {made.id: made for made in vllm_engine.generate(Request(i, segmentation.messages(query)) for i, query in enumerate(queries))}
    with ThreadPoolExecutor(8) as callers:
        futures = list(callers.map(lambda query: vllm_engine.submit(segmentation.messages(query)), queries))
    assert futures[3].cancel() or futures[3].done()
    answered = [i for i, future in enumerate(futures) if not future.cancelled()]
    assert len(answered) >= 39
    for i in answered:
        futures[i].exception(timeout=limit(60))
        made = vllm_engine.completion(i, futures[i])
        assert (made.text, made.finish_reason, made.token_texts) == (batch[i].text, batch[i].finish_reason, batch[i].token_texts)
        assert made.token_logprobs == pytest.approx(batch[i].token_logprobs, abs=0.05)
    long = vllm_engine.submit([{"role": "user", "content": "very long " * 500}])
    long.exception(timeout=limit(60))
    assert "256" in vllm_engine.completion(0, long).error
    vllm_engine.check()
    assert vllm_engine._thread.engine.get_num_unfinished_requests() == 0


def test_vllm_refuses_sampling_that_it_cannot_do(vllm_engine: VllmEngine) -> None:
    with pytest.raises(ConfigError, match="n must be 1 when using greedy sampling") as refused:
        vllm_engine._checked_sampling({**SAMPLING, "n": 2}, "")
    assert refused.value.where == "task.yaml"
    with pytest.raises(ConfigError, match="vLLM does not accept this task"):
        vllm_engine._checked_sampling(SAMPLING, "root ::= {")
    assert vllm_engine._thread.engine.get_num_unfinished_requests() == 0


def test_vllm_samples_are_several_answers_each_with_its_own_tokens(teacher_path: Path, segmentation: Task) -> None:
    """With its likeliest tokens. And a core in a process of its own that is killed is an exception at once, not a wait for ever."""
    config = ModelConfig(max_model_len=256, max_num_seqs=32, kv_cache_gib=0.25, cpus=1, engine_process=True)
    sampling = {**SAMPLING, "max_tokens": 48, "temperature": 2.0, "n": 3, "seed": 5}
    engine = VllmEngine(config, str(teacher_path), segmentation.schema, sampling, top=24)
    try:
        found = list(engine.generate(Request(i, segmentation.messages(f"qwv zork {i} blim")) for i in range(40)))
        assert len({completion.id for completion in found}) == 40
        for completion in found:
            assert len(completion.samples) == 2
            for sample in (completion, *completion.samples):
                assert sample.error == ""
                assert "".join(sample.token_texts) == sample.text
                assert len(sample.token_logprobs) == len(sample.token_texts) == sample.tokens_out > 0
                _likeliest(sample)
            assert completion.tokens_in > 10
            assert all(sample.tokens_in == 0 for sample in completion.samples)
        assert any(len({row.text, *(sample.text for sample in row.samples)}) == 3 for row in found)  # each has a seed of its own
        assert (engine.facts()["samples"], engine.facts()["engine_process"]) == (3, True)
        _kill(engine, segmentation)
    finally:
        engine.close()


def _likeliest(sample: Completion) -> None:
    """At each token the likeliest ones in order, as sure as the log-prob of the one taken says; what is forbidden is the lowest number."""
    top = sample.top
    assert top is not None
    assert (len(top.token_ids), top.ids.shape, top.logprobs.shape) == (sample.tokens_out, (sample.tokens_out, 24), top.ids.shape)
    assert [array.dtype.name for array in top] == ["int32", "int32", "float16"]
    sure = top.logprobs.astype(float)
    assert np.isfinite(sure).all()
    assert (np.diff(sure, axis=1) <= 0).all()
    assert (np.exp(sure).sum(1) <= 1.01).all()
    taken, own = top.ids == top.token_ids[:, None], np.array(sample.token_logprobs)
    rows, places = np.nonzero(taken)
    assert len(rows) >= 8, "all that the grammar forces, at the least"
    assert sure[rows, places] == pytest.approx(own[rows], rel=2e-3, abs=2e-3)
    others = ~taken.any(1)  # temperature 2 takes unlikely tokens too
    assert (own[others] <= sure[others, -1] + 0.01).all()


def _kill(engine: VllmEngine, task: Task) -> None:
    (pid,) = engine.core_pids()
    assert pid != os.getpid()
    stream = engine.generate(Request(i, task.messages(f"query {i}")) for i in range(100_000))
    next(stream)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(Exception, match=r"died|dead|issue"):  # not a HeadtailError: the worker starts another engine
        list(stream)
    assert time.monotonic() - killed < limit(5)
