"""Between text and token ids: prompts made into ids ahead of the engine, sampled ids back into the text each one adds.

In: Requests and the Encoder of a tokenizer with a chat template. Out: ids, in batches, made by a thread while the engine
works: a template and a tokenizer called row by row on the engine's own thread cost 4-7 % of a small model's rows/s.
A row that the template or the tokenizer refuses comes with its reason. Knows nothing of engines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any

from headtail.core.errors import ConfigError
from headtail.core.keys import fingerprint
from headtail.engines.base import Request
from headtail.engines.control import Encoder

BATCH = 64  # rows made into ids by one call; from 16 on a call's own cost no longer shows
AHEAD = 3  # such batches under way: what an engine of 256 rows takes in one step at its start

TokenizedRequest = tuple[Request, list[int], str]  # ids, or none and the reason why


class TokenizeAhead:
    """`requests` with their ids. The source is pulled by the caller's own thread, the ids are made by another."""

    def __init__(self, encoder: Encoder, requests: Iterable[Request]) -> None:
        self._encoder, self._source, self._open = encoder, iter(requests), True
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self._making: deque[Future[list[TokenizedRequest]]] = deque()
        self._ready: deque[TokenizedRequest] = deque()

    def __enter__(self) -> TokenizeAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def more(self) -> bool:
        """Whether `take` may still give a row."""
        return bool(self._open or self._ready or self._making)

    def take(self, wait: bool) -> TokenizedRequest | None:
        """The next row; None at the end, and, unless `wait`, when it is still being made."""
        if not self._ready:
            self._pull()
            if not self._making or not (wait or self._making[0].done()):
                return None
            self._ready.extend(self._making.popleft().result())
            self._pull()
        return self._ready.popleft()

    def _pull(self) -> None:
        while self._open and len(self._making) < AHEAD:
            batch = list(islice(self._source, BATCH))
            self._open = len(batch) == BATCH
            if batch:
                self._making.append(self._pool.submit(tokenize_requests, self._encoder, batch))


def tokenize_requests(encoder: Encoder, batch: Sequence[Request]) -> list[TokenizedRequest]:
    """The ids of each request's prompt. One bad row costs the others only the batch's speed."""
    try:
        return list(zip(batch, encoder.chats([request.messages for request in batch]), [""] * len(batch), strict=True))
    except ConfigError:
        raise  # no row would fare better
    except Exception:
        return [_tokenize_one(encoder, request) for request in batch]


def _tokenize_one(encoder: Encoder, request: Request) -> TokenizedRequest:
    try:
        return request, encoder.chats([request.messages])[0], ""
    except Exception as error:  # whatever this one row did to the template; the others go on
        return request, [], f"{type(error).__name__}: {error}"


def load_tokenizer(path: str, revision: str = "", **extra: Any) -> Any:
    """The tokenizer of a model folder or hub id. No code of the model's own is run."""
    from transformers import AutoTokenizer

    extra |= {"revision": revision} if revision else {}
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **extra)


def length_problem(prompt: Sequence[int], limit: int) -> str:
    """Why a prompt cannot be asked of a model that reads and writes less than `limit` tokens; empty when it can."""
    return "" if 0 < len(prompt) < limit else f"the prompt has {len(prompt)} tokens; with an answer it must fit into max_model_len={limit}"


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Fingerprint of what each token id stands for: two tokenizers whose ids mean the same have the same."""
    return fingerprint(tokenizer.get_vocab())


def answer_texts(tokenizer: Any, ids: Sequence[int], stopped: bool) -> tuple[str, ...]:
    """`token_texts` of a whole answer, whose last token is its end when it `stopped`; that adds nothing."""
    return (*token_texts(tokenizer, ids[:-1]), "") if stopped else token_texts(tokenizer, ids)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds; together they spell the answer. A token that ends inside a character adds nothing yet.

    A control token is spelt out: a grammar reads it as its text; leaving it out here would change an answer silently.
    """
    from tokenizers.decoders import DecodeStream

    stream, inner = DecodeStream(skip_special_tokens=False), tokenizer._tokenizer
    return tuple(stream.step(inner, token) or "" for token in ids)
