"""vLLM itself, on the CPU: what it runs with, what it says of each row and sample, its masks, and its core's death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig, Request
from headtail.engines.device import precision
from headtail.engines.vllm import VllmEngine
from timescale import limit

pytestmark = [
    pytest.mark.slow,
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


def test_vllm_is_sent_typed_control_tokens_as_text(vllm_engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []
    request = vllm_engine._request

    def remember(*fields: Any) -> Any:
        sent.append(fields[1])
        return request(*fields)

    monkeypatch.setattr(vllm_engine, "_request", remember)
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


def test_vllm_masks_filled_and_applied_at_once_are_vllms_own(
    vllm_engine: VllmEngine, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of a run: the same masks from vLLM's own scheduler, and the same logits from xgrammar's own kernel."""
    import torch
    import xgrammar
    from vllm.v1.core.sched.scheduler import Scheduler

    from headtail.engines import masks

    steps: list[int] = []
    filled, applied = masks.BatchedScheduler.get_grammar_bitmask, masks.apply

    def fill(self: Any, scheduler_output: Any) -> Any:
        ours = filled(self, scheduler_output)
        bits = np.zeros(0) if ours is None else ours.grammar_bitmask.copy()
        theirs = Scheduler.get_grammar_bitmask(self, scheduler_output)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.structured_output_request_ids == theirs.structured_output_request_ids
            assert np.array_equal(bits, theirs.grammar_bitmask)
        return ours

    def apply(logits: torch.Tensor, places: list[int], words: np.ndarray[Any, Any]) -> None:
        wanted = logits.clone().float()
        ordered = torch.full((logits.shape[0], words.shape[1]), -1, dtype=torch.int32)
        ordered[places] = torch.from_numpy(words.copy())
        xgrammar.apply_token_bitmask_inplace(wanted, ordered)
        applied(logits, places, words)
        assert torch.equal(logits.float(), wanted)
        assert bool((logits == float("-inf")).any(dim=1).all())
        steps.append(len(places))

    monkeypatch.setattr(masks.BatchedScheduler, "get_grammar_bitmask", fill)
    monkeypatch.setattr(masks, "apply", apply)
    found = list(vllm_engine.generate(Request(i, segmentation.messages(f"burgers {i} in boston")) for i in range(100)))
    assert all(completion.error == "" for completion in found)
    assert len(steps) > 20
    assert max(steps) == 64


def test_vllm_rows_without_a_grammar_are_not_masked() -> None:
    import torch

    from headtail.engines.grammar import apply

    logits = torch.zeros((3, 40), dtype=torch.bfloat16)
    words = np.array([[0b101, 0], [-1, 1]], dtype=np.int32)
    apply(logits, [2, 0], words)
    assert torch.isinf(logits).sum(dim=1).tolist() == [7, 0, 38]
    assert logits[2, [0, 2]].tolist() == [0, 0]
    assert logits[0, 32] == 0


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
