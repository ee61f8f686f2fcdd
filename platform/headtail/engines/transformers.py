"""Engine on transformers: rows of similar length together, for students so small that vLLM's overhead exceeds the model's work.

In: Requests, the folder of a decoder or of a seq2seq student (T5 type). Out: Completions under the task's grammar, with finish
reason and the log-prob of each token, for every sample. vLLM's own work per row and step takes about 100 us on a CPU; here a step
is one call for all rows of a batch, and rows that end leave it. The common start of a batch's prompts is read once. Rows that
come later wait for the next batch: for long answers and large models use vLLM. Knows nothing of tasks or stores.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headtail.core import io_format
from headtail.core.errors import ConfigError, EngineError
from headtail.engines.base import Bound, Completion, ModelConfig, Request
from headtail.engines.batches import BatchEngine, Prompt
from headtail.engines.control import Encoder
from headtail.engines.device import precision, quiet_transformers, threads
from headtail.engines.grammar import Masks
from headtail.engines.tokens import answer_texts, length_problem, load_tokenizer, tokenize_requests

VERSION = 2  # raise it when the same weights answer otherwise
CPU_ROOM = (256, 8192)  # rows and prompt tokens of a batch
GPU_ROOM = (1024, 65536)
SHARED = 8  # a common beginning shorter than this is not worth a pass of its own


class TransformersEngine(BatchEngine):
    """A loaded decoder or encoder-decoder."""

    def __init__(self, config: ModelConfig, path: str, bound: Bound, sampling: Mapping[str, Any]) -> None:
        _check(config)
        super().__init__(config, CPU_ROOM, GPU_ROOM, int(sampling.get("n", 1)))
        self.kind = io_format.read_format(Path(path)).kind
        model, self._tokenizer = load_generator(path, precision(config), config.revision, self.kind)
        self._encoder, self._pad = Encoder(self._tokenizer, config.system_role), self._tokenizer.pad_token_id or 0
        self._ends = ends(model, self._tokenizer)
        self._masks = Masks(self._tokenizer, model.config.vocab_size, sorted(self._ends), bound, sampling["max_tokens"], threads(config))
        self._sampling, self._steps, self._window = sampling, 0, attention_window(model) if self.kind == "decoder" else 0
        self._ready(model)

    def facts(self) -> dict[str, Any]:
        return {"engine": "transformers", **super().facts(), "structured_outputs": self._masks.how, "steps": self._steps}

    def _prompts(self, window: Sequence[Request]) -> Iterator[tuple[Prompt, str]]:
        if self.kind == "decoder":
            found = tokenize_requests(self._encoder, window)
        else:
            read = prompt_ids(self._encoder, self._tokenizer.eos_token_id, [prompt_text(request.messages) for request in window])
            found = [(request, ids, "") for request, ids in zip(window, read, strict=True)]
        for request, ids, unread in found:
            yield (request, None, ids), unread or length_problem(ids, self._limit)

    def _answer(self, batch: Sequence[Prompt]) -> Iterator[Completion]:
        prompts = [ids for *_, ids in batch for _ in range(self._samples)]
        shared = self._shared(prompts)
        rows = self._write(prompts, shared)
        for i, (request, _, ids) in enumerate(batch):
            mine = rows[i * self._samples : (i + 1) * self._samples]
            first, *others = (self._completion(request, row) for row in mine)
            yield replace(first, tokens_in=len(ids), tokens_cached=shared if i else 0, samples=tuple(others))

    def _shared(self, prompts: Sequence[list[int]]) -> int:
        """How many tokens are read once for all. None where a window could begin in them: what pads a row behind them would be in it."""
        if self.kind != "decoder" or (self._window and max(map(len, prompts)) + self._sampling["max_tokens"] > self._window):
            return 0
        return _shared_prefix(prompts)

    def _write(self, prompts: Sequence[list[int]], shared: int) -> list[_Row]:
        """What is written after each prompt. All rows go on together; those that end leave."""
        most, limit = self._sampling["max_tokens"], self._limit
        rows = [_Row(min(most, limit - len(ids)), self._masks.matcher()) for ids in prompts]
        running, begun = rows, time.monotonic()
        with self._torch.inference_mode():
            under_way: _CausalRows | _Seq2SeqRows
            if self.kind == "decoder":
                under_way = _CausalRows(self._model, self._pad, prompts, shared)
            else:
                under_way = _Seq2SeqRows(self._model, self._pad, prompts)
            self._count(len(rows), under_way.cells, under_way.real)
            random = self._random()
            logits = under_way.first()
            while True:
                self._steps += 1
                self._forward_s += time.monotonic() - begun
                self._masks.apply(logits, [row.matcher for row in running])
                chosen, sure = self._choose(logits, random)
                told = zip(running, chosen.tolist(), sure.tolist(), strict=True)
                going = [i for i, (row, token, chance) in enumerate(told) if row.add(token, chance, self._ends)]
                if not going:
                    return rows
                begun = time.monotonic()
                if len(going) < len(running):
                    running = [running[i] for i in going]
                    kept = self._torch.tensor(going, device=self._device)
                    chosen = chosen[kept]
                    under_way.keep(kept)
                logits = under_way.next(chosen)

    def _random(self) -> Any:
        """Where a batch's chance comes from; a seed makes it the same for the same batch."""
        found = self._torch.Generator(self._device)
        seed = self._sampling.get("seed")
        if seed is None:
            found.seed()
        else:
            found.manual_seed(seed)
        return found

    def _choose(self, logits: Any, random: Any) -> tuple[Any, Any]:
        """(token, its log-prob before temperature) for each row. The log-prob is NaN where no token may follow."""
        heat, total = self._sampling["temperature"], logits.logsumexp(-1)
        if not heat:
            best, chosen = logits.max(-1)
            return chosen, best - total
        from transformers import TopPLogitsWarper

        hot = logits / heat
        if self._sampling["top_p"] < 1:
            hot = TopPLogitsWarper(self._sampling["top_p"])(None, hot)
        chance = hot.softmax(-1).nan_to_num(1.0)  # a row without a token is recognised by its log-prob
        chosen = self._torch.multinomial(chance, 1, generator=random)
        return chosen[:, 0], logits.gather(1, chosen)[:, 0] - total

    def _completion(self, request: Request, row: _Row) -> Completion:
        if not row.reason:
            problem = "no token of this model's vocabulary fits the grammar here: the tokenizer cannot write the task's answers"
            return Completion(request.id, finish_reason="error", error=problem)
        texts = answer_texts(self._tokenizer, row.ids, row.reason == "stop")
        return Completion(request.id, "".join(texts), row.reason, 0, len(row.ids), 0, texts, tuple(row.logprobs))


class _Row:
    """An answer under way. `reason` is empty when the grammar let nothing follow."""

    __slots__ = ("ids", "left", "logprobs", "matcher", "reason")

    def __init__(self, most: int, matcher: Any) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.left, self.matcher, self.reason = most, matcher, ""

    def add(self, token: int, sure: float, ends: frozenset[int]) -> bool:
        """Whether it goes on after `token`."""
        if sure != sure:  # NaN
            return False
        self.ids.append(token)
        self.logprobs.append(sure)
        self.left -= 1
        self.reason = "stop" if token in ends else "length" if not self.left else ""
        if not self.reason and self.matcher is not None:
            self.matcher.accept_token(token)
        return not self.reason


class _CausalRows:
    """Rows of a causal model: prompts padded on the left, behind the `shared` tokens that all begin with."""

    def __init__(self, model: Any, pad: int, prompts: Sequence[Sequence[int]], shared: int) -> None:
        import torch
        from transformers import DynamicCache

        self._torch, self._model, self._cache = torch, model, DynamicCache(config=model.config)
        rest = [ids[shared:] for ids in prompts]
        wide = max(map(len, rest))
        self._ids = torch.tensor([[pad] * (wide - len(ids)) + list(ids) for ids in rest], device=model.device)
        self._mask = torch.tensor([[1] * shared + [0] * (wide - len(ids)) + [1] * len(ids) for ids in rest], device=model.device)
        self._place = (self._mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        self.cells, self.real = self._ids.numel() + shared, sum(map(len, rest)) + shared
        self._full = self.cells == self.real  # nothing is padded: torch's quick way for causal attention
        if shared:
            self._forward(torch.tensor([prompts[0][:shared]], device=model.device), None, None)
            self._cache.batch_repeat_interleave(len(prompts))

    def first(self) -> Any:
        """Logits after the prompts, shape (rows, vocabulary), fp32."""
        return self._forward(self._ids, self._mask, self._place)

    def next(self, tokens: Any) -> Any:
        """Logits after one more token of each row."""
        self._place = self._place[:, -1:] + 1
        self._mask = self._torch.cat([self._mask, self._mask.new_ones((len(tokens), 1))], 1)
        return self._forward(tokens[:, None], self._mask, self._place)

    def keep(self, rows: Any) -> None:
        """Go on with these rows alone."""
        self._mask, self._place = self._mask[rows], self._place[rows]
        self._cache.batch_select_indices(rows)

    def _forward(self, ids: Any, mask: Any, place: Any) -> Any:
        asked = {"input_ids": ids, "attention_mask": None if self._full else mask, "position_ids": place}
        return self._model(**asked, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()


class _Seq2SeqRows:
    """Rows of an encoder-decoder: prompts read once, answers written step by step."""

    def __init__(self, model: Any, pad: int, prompts: Sequence[Sequence[int]]) -> None:
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        self._model, self._cache = model, EncoderDecoderCache(DynamicCache(), DynamicCache())
        wide = max(map(len, prompts))
        ids = torch.tensor([list(ids) + [pad] * (wide - len(ids)) for ids in prompts], device=model.device)
        self._mask = torch.tensor([[1] * len(ids) + [0] * (wide - len(ids)) for ids in prompts], device=model.device)
        self._read = model.get_encoder()(input_ids=ids, attention_mask=self._mask)
        self.cells, self.real = ids.numel(), sum(map(len, prompts))
        self._start = torch.full((len(prompts),), model.config.decoder_start_token_id, device=model.device)

    def first(self) -> Any:
        """Logits of the first token, shape (rows, vocabulary), fp32."""
        return self.next(self._start)

    def next(self, tokens: Any) -> Any:
        """Logits after one more token of each row."""
        asked = {"encoder_outputs": self._read, "attention_mask": self._mask, "decoder_input_ids": tokens[:, None]}
        return self._model(**asked, past_key_values=self._cache, use_cache=True).logits[:, -1].float()

    def keep(self, rows: Any) -> None:
        """Go on with these rows alone."""
        self._mask = self._mask[rows]
        self._read.last_hidden_state = self._read.last_hidden_state[rows]
        self._cache.batch_select_indices(rows)


def _check(config: ModelConfig) -> None:
    for name, none in (("quantization", ""), ("tensor_parallel", 1)):
        if getattr(config, name) != none:
            fix = f"leave model.{name} out, or set model.engine=vllm"
            raise ConfigError(f"this engine does not support {name}", where=f"model.{name}", value=getattr(config, name), fix=fix)


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, each keeping one of its own; 0 when they are too few to matter."""
    first, last = min(prompts), max(prompts)  # what these two share, all that sort between them do
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    found = min(same, min(map(len, prompts)) - 1)
    return found if len(prompts) > 1 and found >= SHARED else 0


def ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's folder names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return frozenset(token for token in (tokenizer.eos_token_id, *more) if token is not None)


def attention_window(model: Any) -> int:
    """Tokens that the narrowest layers of a decoder see, as in Gemma and Mistral; 0 where all layers see everything."""
    from transformers import DynamicCache

    return min((layer.sliding_window for layer in DynamicCache(config=model.config).layers if layer.is_sliding), default=0)


def prompt_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What an encoder-decoder reads: the messages, a line each; it knows no roles."""
    return "\n".join(message["content"] for message in messages)


def prompt_ids(encoder: Encoder, end: int, texts: Iterable[str]) -> list[list[int]]:
    """Ids of prompts, each closed by the token `end`, as T5 was trained."""
    return [[*ids, end] for ids in encoder.texts(texts)]


def load_generator(path: str, dtype: str = "float32", revision: str = "", kind: str = "seq2seq") -> tuple[Any, Any]:
    """(model of a kind, tokenizer) from a folder or hub id."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    quiet_transformers()
    extra: dict[str, Any] = {"revision": revision} if revision else {}
    found, fix = AutoModelForCausalLM, "take a causal model"
    if kind == "seq2seq":
        found, fix = AutoModelForSeq2SeqLM, "take a T5, BART or like model"
    try:
        model = found.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=False, **extra)
    except (OSError, ValueError) as error:
        raise EngineError(f"the model did not load: {error}", where=path, fix=fix) from error
    return model, load_tokenizer(path, revision)
