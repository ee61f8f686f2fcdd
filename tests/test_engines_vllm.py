"""vLLM itself, on the CPU: what it runs with, what it says of each row and sample, its masks, and its core's death."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headtail.engines import Engine, ModelConfig, Request, open_engine
from headtail.task import Task

SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 120, "seed": None}


@pytest.fixture(scope="module")
def vllm_engine(teacher_path: Path, segmentation: Task) -> Iterator[Engine]:
    config = ModelConfig(max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25, cpus=2)
    engine = open_engine(config, str(teacher_path), segmentation.schema, {**SAMPLING, "max_tokens": 48})
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning")  # xgrammar to vLLM, in its threads
def test_vllm_runs_as_asked_and_says_so(vllm_engine: Engine) -> None:
    facts = vllm_engine.facts()
    assert (facts["max_num_seqs"], facts["max_num_batched_tokens"], facts["max_model_len"]) == (64, 8192, 256)
    assert (facts["device"], facts["dtype"], facts["prefix_caching"], facts["threads"]) == ("cpu", "bfloat16", True, 2)
    assert facts["structured_outputs"] == "xgrammar, no free whitespace"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning")  # xgrammar to vLLM, in its threads
def test_vllm_each_row_once_with_what_it_says(vllm_engine: Engine, segmentation: Task) -> None:
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
        assert "".join(completion.token_texts) == completion.text
        assert len(completion.token_logprobs) == len(completion.token_texts) == completion.tokens_out
        assert all(logprob <= 1e-6 for logprob in completion.token_logprobs)
        assert completion.tokens_in > 10
        if completion.finish_reason == "stop":
            answer, problem = segmentation.parse(completion.text)
            assert problem == ""
            assert completion.text == segmentation.target(answer)  # the very spelling that students are taught


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning")  # xgrammar to vLLM, in its threads
def test_vllm_abandoned_rows_leave_nothing_behind(vllm_engine: Engine, segmentation: Task) -> None:
    stream = vllm_engine.generate(Request(i, segmentation.messages(f"query {i}")) for i in range(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    again = list(vllm_engine.generate(Request(i, segmentation.messages(f"other {i}")) for i in range(5)))
    assert sorted(completion.id for completion in again) == [0, 1, 2, 3, 4]
