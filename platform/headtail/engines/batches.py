"""Shared by engines that run the rows of a batch together: free places, reading ahead, sorting by length, figures.

In: Requests; from the engine, how a row is read and how a batch is answered. Out: Completions. Knows nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from headtail.engines.base import Completion, ModelConfig, Request
from headtail.engines.device import set_environment, threads

T = TypeVar("T")
AHEAD = 2048  # rows read ahead and sorted by length
Prompt = tuple[Request, Any, list[int]]  # a row, what the engine made of it, its ids


class BatchEngine:
    """Base of such an engine. `room`: rows and prompt tokens of a batch where the config names none; `samples`: answers per row."""

    def __init__(self, config: ModelConfig, cpu_room: tuple[int, int], gpu_room: tuple[int, int], samples: int = 1) -> None:
        self._started = time.monotonic()
        set_environment(config)
        import torch

        self.config, self._torch, self._device = config, torch, "cuda" if config.gpus else "cpu"
        if not config.gpus:
            torch.set_num_threads(threads(config))
        rows, tokens = gpu_room if config.gpus else cpu_room
        self._rows, self._tokens, self._samples = config.max_num_seqs or rows, config.max_num_batched_tokens or tokens, samples
        self._asked = self._cells = self._real = 0
        self._forward_s = self.start_s = 0.0
        self._limit = config.max_model_len
        self._model: Any = None

    def _ready(self, model: Any) -> None:
        """The model is loaded."""
        self._model = model.to(self._device).eval()
        self.start_s = time.monotonic() - self._started

    def _prompts(self, window: Sequence[Request]) -> Iterator[tuple[Prompt, str]]:
        """Each row as it is read, and why it cannot be asked, if so."""
        raise NotImplementedError

    def _answer(self, batch: Sequence[Prompt]) -> Iterator[Completion]:
        raise NotImplementedError

    def generate(self, requests: Iterable[Request]) -> Generator[Completion]:
        """Completions, batch by batch; within what is read ahead in order of length."""
        source = iter(requests)
        while window := list(islice(source, AHEAD)):
            fit: list[Prompt] = []
            for prompt, problem in self._prompts(window):
                if problem:
                    yield Completion(prompt[0].id, finish_reason="error", error=problem)
                else:
                    fit.append(prompt)
            for batch in cut_batches(fit, lambda prompt: len(prompt[2]), max(1, self._rows // self._samples), self._tokens):
                yield from self._answer(batch)

    def _count(self, rows: int, cells: int, real: int) -> None:
        """A batch of `rows` takes `cells` tokens, `real` of them no padding."""
        self._asked, self._cells, self._real = self._asked + rows, self._cells + cells, self._real + real

    def facts(self) -> dict[str, Any]:
        """Arguments in use, and figures so far."""
        import transformers

        return {
            "version": transformers.__version__,
            "device": self._device,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "max_model_len": self._limit,
            "max_num_seqs": self._rows,
            "max_num_batched_tokens": self._tokens,
            "threads": None if self.config.gpus else self._torch.get_num_threads(),
            "engine_process": False,
            "samples": self._samples,
            "start_s": round(self.start_s, 2),
            "engine_rows": self._asked,
            "forward_s": round(self._forward_s, 3),
            "real_token_share": round(self._real / self._cells, 4) if self._cells else None,
        }

    def close(self) -> None:
        self._model = None  # twice is once


def cut_batches(prompts: Sequence[T], length: Callable[[T], int], rows: int, tokens: int) -> Iterator[Sequence[T]]:
    """`prompts` in order of length, a batch at a time: at most `rows` rows and, padded, `tokens` tokens; never less than a row."""
    prompts = sorted(prompts, key=length)
    begin = 0
    while begin < len(prompts):
        end = min(begin + rows, len(prompts))
        while end - begin > 1 and (end - begin) * length(prompts[end - 1]) > tokens:
            end = begin + max(1, min(end - begin - 1, tokens // length(prompts[end - 1])))
        yield prompts[begin:end]
        begin = end
