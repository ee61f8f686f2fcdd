"""Seq2seq students (T5 type) behind the engines' door: transformers' own generation, in batches of like length.

In: Requests, a model folder. Out: Completions with text, finish reason and log-probs per token. No grammar binds what is
written: what is no answer ends as `invalid`. Knows nothing of tasks or stores.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from headtail.engines import Completion, ModelConfig, Request
from headtail.engines.device import precision, quiet_transformers, set_environment, threads
from headtail.engines.tokens import token_texts
from headtail.errors import EngineError

FORM = 1  # raise it when the same weights answer otherwise
AHEAD = 1024  # rows read ahead and sorted by length
CPU_ROWS, GPU_ROWS = 128, 512  # rows written together


class Seq2SeqEngine:
    """A loaded encoder-decoder."""

    def __init__(self, config: ModelConfig, path: str, schema: dict[str, Any] | None, sampling: Mapping[str, Any]) -> None:
        started = time.monotonic()
        set_environment(config)
        import torch

        self.config, self._torch, self._device = config, torch, "cuda" if config.gpus else "cpu"
        if not config.gpus:
            torch.set_num_threads(threads(config))
        self._model, self._tokenizer = load(path, precision(config), config.revision)
        self._model.to(self._device).eval()
        self._rows = config.max_num_seqs or (GPU_ROWS if config.gpus else CPU_ROWS)
        self._sampling = sampling
        self._samples = int(sampling.get("n", 1)) if sampling["temperature"] else 1  # likeliest tokens are the same each time
        self.start_s = time.monotonic() - started

    def facts(self) -> dict[str, Any]:
        """What is in force."""
        import transformers

        return {
            "engine": "seq2seq",
            "version": transformers.__version__,
            "device": self._device,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "max_model_len": self.config.max_model_len,
            "max_num_seqs": self._rows,
            "structured_outputs": "none",
            "threads": None if self.config.gpus else self._torch.get_num_threads(),
            "engine_process": False,
            "samples": self._samples,
            "start_s": round(self.start_s, 2),
        }

    def generate(self, requests: Iterable[Request]) -> Generator[Completion]:
        """Completions, batch by batch; within what is read ahead in order of length."""
        source, limit = iter(requests), self.config.max_model_len - int(self._sampling["max_tokens"])
        while window := list(islice(source, AHEAD)):
            ids = prompt_ids(self._tokenizer, [prompt_text(request.messages) for request in window])
            asked = sorted(zip(window, ids, strict=True), key=lambda one: len(one[1]))
            for request, found in asked:
                if len(found) > limit:
                    problem = (
                        f"the prompt has {len(found)} tokens; with an answer it must fit into max_model_len={self.config.max_model_len}"
                    )
                    yield Completion(request.id, finish_reason="error", error=problem)
            fit = [one for one in asked if len(one[1]) <= limit]
            for begin in range(0, len(fit), self._rows):
                yield from self._answer(fit[begin : begin + self._rows])

    def _answer(self, batch: Sequence[tuple[Request, list[int]]]) -> Iterator[Completion]:
        torch, asked = self._torch, self._sampling
        made = self._tokenizer.pad({"input_ids": [ids for _, ids in batch]}, return_tensors="pt").to(self._device)
        options: dict[str, Any] = {"do_sample": False}
        if asked["temperature"]:
            options = {"do_sample": True, "temperature": asked["temperature"], "top_p": asked["top_p"], "top_k": 0}
            if asked.get("seed") is not None:
                torch.manual_seed(asked["seed"])
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=made["input_ids"],
                attention_mask=made["attention_mask"],
                max_new_tokens=asked["max_tokens"],
                num_return_sequences=self._samples,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
            scores = self._model.compute_transition_scores(found.sequences, found.logits, normalize_logits=True)
        written = found.sequences[:, 1:].tolist()  # the first token starts the decoder
        rows = [
            self._completion(batch[i // self._samples], ids, row) for i, (ids, row) in enumerate(zip(written, scores.tolist(), strict=True))
        ]
        for i in range(0, len(rows), self._samples):
            first, *others = rows[i : i + self._samples]
            yield _with(first, tuple(others)) if others else first

    def _completion(self, asked: tuple[Request, list[int]], ids: list[int], logprobs: list[float]) -> Completion:
        end = self._tokenizer.eos_token_id
        stopped = end in ids
        count = ids.index(end) + 1 if stopped else len(ids)
        texts = token_texts(self._tokenizer, ids[:count])
        reason = "stop" if stopped else "length"
        return Completion(asked[0].id, "".join(texts), reason, len(asked[1]), count, 0, texts, tuple(logprobs[:count]))

    def close(self) -> None:
        del self._model


def _with(first: Completion, others: tuple[Completion, ...]) -> Completion:
    return replace(first, samples=tuple(replace(other, tokens_in=0) for other in others))


def prompt_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What an encoder-decoder reads: the messages, a line each; it knows no roles."""
    return "\n".join(message["content"] for message in messages)


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts, each closed by the end token, as T5 was trained."""
    end = tokenizer.eos_token_id
    return [[*ids, end] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def load(path: str, dtype: str = "float32", revision: str = "") -> tuple[Any, Any]:
    """(encoder-decoder, tokenizer) from a folder or hub id."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    quiet_transformers()
    extra: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **extra)
    except (OSError, ValueError) as error:
        raise EngineError(f"the model did not load: {error}", where=path, fix="take a T5, BART or like model") from error
    return model, AutoTokenizer.from_pretrained(path, **extra)
