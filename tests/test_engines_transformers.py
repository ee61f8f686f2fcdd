"""The engine of students too small for vLLM: rows written together say what each says alone, and nothing but answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.batch.job import answer_settings
from headtail.core import io_format
from headtail.core.errors import ConfigError
from headtail.core.io_format import IOFormat, ModelFormat
from headtail.core.keys import fingerprint
from headtail.core.task import Task, load_task
from headtail.engines import Completion, ModelConfig, Request, open_engine
from headtail.engines.batches import cut_batches
from headtail.engines.transformers import TransformersEngine, _shared_prefix, attention_window
from headtail.stages.distill.base import Shape, make_decoder_base
from headtail.stages.distill.seq2seq import Seq2SeqLearner
from headtail.stages.distill.tokenizer import train_tokenizer

QUERY_ONLY = IOFormat(prompt="query_only", output="compact")
TINY = Shape(vocabulary=400, hidden=32, layers=2, heads=2, feed_forward=64, positions=512)
SAMPLING: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 24, "seed": None}
QUERIES = [f"{'cheap ' * (i % 5)}thai food {i} near me" for i in range(60)]


def student(folder: Path, task: Task, chosen: IOFormat, kind: io_format.Kind) -> ModelFormat:
    """Random weights in fp32, an I/O format, and a tokenizer that has seen some of the words."""
    made = io_format.format_for(task, chosen, kind)
    texts = [*QUERIES, *(m["content"] for m in task.messages("x")), '{"segments": [{"text": "thai food", "label": "topic"}]}']
    if kind == "seq2seq":
        model, tokenizer = Seq2SeqLearner(made).make(TINY, texts, 0)
    else:
        tokenizer = train_tokenizer(texts, TINY.vocabulary)
        tokenizer.chat_template = made.chat_template or tokenizer.chat_template
        model = make_decoder_base(TINY, tokenizer, 0)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    io_format.write_format(made, folder)
    return made


def opened(folder: Path, task: Task, made: ModelFormat, config: dict[str, Any] | None = None, **sampling: Any) -> TransformersEngine:
    asked = {**SAMPLING, **sampling}
    how = ModelConfig.model_validate(
        {"engine": "transformers", "dtype": "float32", "max_num_seqs": 16, "max_model_len": 256, **(config or {})}
    )
    engine = open_engine(how, str(folder), made.bound(task, asked["max_tokens"]), asked)
    assert isinstance(engine, TransformersEngine)
    return engine


def requests(task: Task, made: ModelFormat, queries: Sequence[str] = QUERIES) -> list[Request]:
    return [Request(i, made.messages(task, query)) for i, query in enumerate(queries)]


def alone(engine: TransformersEngine, request: Request) -> tuple[list[int], list[float]]:
    """What one row says, by whole forward passes over all that was read and written: no cache, no padding, no batch."""
    import torch

    model = engine._model
    (((_, _, prompt), _),) = engine._prompts([request])
    matcher = engine._masks.matcher()
    ids: list[int] = []
    sure: list[float] = []
    with torch.inference_mode():
        while len(ids) < SAMPLING["max_tokens"] and (not ids or ids[-1] not in engine._ends):
            if engine.kind == "decoder":
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[:, -1]
            else:
                start = [model.config.decoder_start_token_id, *ids]
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[:, -1]
            engine._masks.apply(logits, [matcher])
            best, at = logits.log_softmax(-1).max(-1)
            ids.append(int(at))
            sure.append(float(best))
            if ids[-1] not in engine._ends and matcher is not None:
                matcher.accept_token(ids[-1])
    return ids, sure


@pytest.mark.parametrize(
    "kind, chosen",
    [
        ("decoder", IOFormat()),  # the task's prompt: most of it is shared by all rows
        ("decoder", QUERY_ONLY),
        ("seq2seq", QUERY_ONLY),
    ],
)
def test_rows_written_together_say_what_each_says_alone(tmp_path: Path, segmentation: Task, kind: io_format.Kind, chosen: IOFormat) -> None:
    """Padding, a beginning read once for all, rows that leave early: none changes a token or its log-prob."""
    made = student(tmp_path, segmentation, chosen, kind)
    engine = opened(tmp_path, segmentation, made)
    asked = requests(segmentation, made)
    found = {one.id: one for one in engine.generate(asked)}
    assert sorted(found) == list(range(len(QUERIES)))
    for request in asked[::7]:
        ids, sure = alone(engine, request)
        one = found[request.id]
        assert one.tokens_out == len(ids)
        assert one.text == engine._tokenizer.decode([i for i in ids if i not in engine._ends], skip_special_tokens=True)
        assert one.token_logprobs == pytest.approx(sure, abs=1e-4)
    assert {one.finish_reason for one in found.values()} <= {"stop", "length"}
    assert all("".join(one.token_texts) == one.text and len(one.token_texts) == len(one.token_logprobs) for one in found.values())
    cached = [one.tokens_cached for one in found.values()]
    assert (max(cached) > 8) == (made.default)
    facts = engine.facts()
    assert facts["engine_rows"] == len(QUERIES)
    assert 0.5 < facts["real_token_share"] <= 1
    engine.close()


@pytest.mark.parametrize("window", [24, 400])
def test_rows_of_sliding_windows_say_what_each_says_alone(tmp_path: Path, segmentation: Task, window: int) -> None:
    """Gemma's kind: two of three layers see `window` tokens. Prompts of about 90 tokens begin alike and differ in length."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    made = student(tmp_path, segmentation, IOFormat(), "decoder")
    known = json.loads((tmp_path / "config.json").read_text())
    model = Gemma3ForCausalLM(gemma_config(known, window, Gemma3TextConfig))
    model.save_pretrained(tmp_path)
    engine = opened(tmp_path, segmentation, made)
    asked = requests(segmentation, made)
    assert attention_window(engine._model) == window
    found = {one.id: one for one in engine.generate(asked)}
    for request in asked[:10]:
        ids, sure = alone(engine, request)
        assert found[request.id].tokens_out == len(ids)
        assert found[request.id].token_logprobs == pytest.approx(sure, abs=1e-4)
    assert (max(one.tokens_cached for one in found.values()) > 8) == (window == 400), "a common beginning is read once where it fits"
    engine.close()


def gemma_config(known: dict[str, Any], window: int, made: Any) -> Any:
    """A small Gemma 3 with the vocabulary and the special tokens of another model's config."""
    import torch

    torch.manual_seed(0)
    names = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")
    return made(
        **{name: known.get(name) for name in names},
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=window,
        max_position_embeddings=512,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        initializer_range=0.3,
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task whose answers end soon, whatever is said."""
    folder = tmp_path_factory.mktemp("short")
    fields = {"kind": {"enum": ["a", "b"]}, "name": {"type": "string", "maxLength": 6}, "open": {"type": "boolean"}}
    plain = {
        "name": "short",
        "answer": {"type": "object", "properties": fields, "required": ["kind", "name"], "additionalProperties": False},
        "sampling": {"max_tokens": 60},
        "score": {"kind": "exact"},
        "fallback": {"kind": "a", "name": ""},
    }
    (folder / "task.yaml").write_text(json.dumps(plain))
    (folder / "prompt.j2").write_text("{% block user %}{{ query }}{% endblock %}")
    return load_task(folder)


@pytest.mark.parametrize("kind, chosen", [("decoder", QUERY_ONLY), ("seq2seq", QUERY_ONLY)])
def test_whatever_is_said_at_random_is_an_answer(tmp_path: Path, short: Task, kind: io_format.Kind, chosen: IOFormat) -> None:
    """Samples differ, each is its own, all parse; the same seed says the same again. Special tokens, which spell signs, are never said."""
    made = student(tmp_path, short, chosen, kind)
    said: list[list[str]] = []
    for _ in range(2):
        engine = opened(tmp_path, short, made, temperature=1.5, top_p=0.95, n=3, seed=7, max_tokens=60)
        rows = sorted(engine.generate(requests(short, made)), key=lambda one: one.id)
        said.append([one.text for row in rows for one in (row, *row.samples)])
        assert all(len(row.samples) == 2 and row.tokens_in and not any(one.tokens_in for one in row.samples) for row in rows)
        for row in rows:
            for one in (row, *row.samples):
                assert one.finish_reason == "stop"
                assert made.parse_text(short, one.text).problem == ""
        engine.close()
    assert said[0] == said[1]
    assert len(set(said[0])) > 40


def test_a_row_that_cannot_be_asked_is_told_and_the_others_go_on(tmp_path: Path, segmentation: Task) -> None:
    made = student(tmp_path, segmentation, IOFormat(), "decoder")
    engine = opened(tmp_path, segmentation, made, {"max_model_len": 160}, max_tokens=150)
    asked = requests(segmentation, made, QUERIES[:5])
    asked[2] = Request(2, [{"role": "user", "content": "very long " * 500}])
    asked[3] = Request(3, [{"nonsense": "x"}])
    found: dict[int, Completion] = {one.id: one for one in engine.generate(asked)}
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert "160" in found[2].error
    assert found[3].error
    for i in (0, 1, 4):
        assert not found[i].error
        assert found[i].tokens_in + found[i].tokens_out <= 160
    engine.close()


@pytest.mark.parametrize("kind, chosen", [("decoder", IOFormat()), ("decoder", QUERY_ONLY), ("seq2seq", QUERY_ONLY)])
def test_typed_control_tokens_are_read_as_text(tmp_path: Path, segmentation: Task, kind: io_format.Kind, chosen: IOFormat) -> None:
    made = student(tmp_path, segmentation, chosen, kind)
    engine = opened(tmp_path, segmentation, made, max_tokens=8)
    (((_, _, plain), _), ((_, _, typed), _)) = engine._prompts(requests(segmentation, made, ["pizza", "pizza<|user|><|end|>"]))
    control = engine._encoder.control
    assert [i for i in plain if i in control] == [i for i in typed if i in control]
    assert "pizza<|user|><|end|>" in engine._tokenizer.decode(typed)


def test_a_vocabulary_that_cannot_spell_the_answer_is_an_error_of_the_row(tmp_path: Path, segmentation: Task) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "thai": 2, "food": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = io_format.QUERY_ONLY_TEMPLATE
    for saved in (make_decoder_base(TINY, tokenizer, 0), tokenizer):
        saved.save_pretrained(tmp_path)
    for heat in (0.0, 1.0):
        (found,) = opened(tmp_path, segmentation, io_format.DEFAULT, temperature=heat).generate(
            [Request(0, [{"role": "user", "content": "thai"}])]
        )
        assert "cannot write the task" in found.error


def test_what_it_cannot_do_is_refused_and_its_answers_are_its_own(tmp_path: Path, segmentation: Task) -> None:
    made = student(tmp_path, segmentation, QUERY_ONLY, "decoder")
    for field, value in (("quantization", "fp8"), ("tensor_parallel", 2)):
        with pytest.raises(ConfigError, match=field):
            opened(tmp_path, segmentation, made, {field: value})
    keys = {fingerprint(answer_settings(segmentation, ModelConfig(engine=engine), "d", made)) for engine in ("vllm", "transformers")}
    assert len(keys) == 2


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=6))
def test_what_all_prompts_begin_with(prompts: list[list[int]]) -> None:
    found = _shared_prefix(prompts)
    assert all(ids[:found] == prompts[0][:found] and len(ids) > found for ids in prompts)
    longest = next((n for n in range(min(map(len, prompts)) - 1, 0, -1) if len({tuple(ids[:n]) for ids in prompts}) == 1), 0)
    assert found == (longest if longest >= 8 and len(prompts) > 1 else 0)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 9), st.integers(1, 80))
def test_batches_hold_every_row_once_within_bounds(lengths: list[int], rows: int, tokens: int) -> None:
    batches = list(cut_batches(lengths, lambda n: n, rows, tokens))
    assert [n for batch in batches for n in batch] == sorted(lengths)
    for batch in batches:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * batch[-1] <= tokens
