"""Parse an endpoint's chat-completions bodies: completions, and settings that it refuses for every row. Pure.

In: a parsed body, or the text of a refusal and what was sent. Out: a Completion, whose finish reason and text decide the row's state
(docs/engines.md has the table), or a Setting to change. Nothing is repaired. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from headtail.core.secrets import hide
from headtail.engines.base import Completion

_SPEAKS = ("content_filter", "length", "tool_calls", "function_call")  # finish reasons that say why there is no content
_MOST_TOKENS = 2**31 - 1  # of one reply: what the answers' columns hold
_FINISH_CHARS = 50  # of a finish reason that are kept
_ROUNDING = 1e-3  # above 0 that a log-prob may be: endpoints compute in 16 bits
_REASONING = ("reasoning_content", "reasoning")  # names that endpoints give to what a model wrote before its answer
_UNKNOWN = re.compile(
    r"unsupported|not supported|does not support|unrecogni[sz]ed|unknown|not permitted|not allowed|extra[ _](fields|inputs|forbidden)", re.I
)
_SYSTEM = re.compile(r"system[\s'\"]{1,3}(role|message|prompt|instruction)s?\b|role\b.{0,20}\bsystem|roles must alternate", re.I)
_NO_MODEL = re.compile(
    r"\b(invalid|unknown|no such|unrecogni[sz]ed) model\b(?! (output|input))"
    r"|\bmodel\b[^.]{0,80}\b(not found|not exist|not (a )?valid|not available|not loaded|decommissioned|retired|deprecated)\b"
    r"|\bnot a valid model\b",
    re.I,
)
_MODEL_CODES = ("model_not_found", "invalid_model", "model_not_exist", "model_decommissioned")
_NO_KEY = re.compile(
    r"\bapi[ _-]?key\b[^.]{0,40}\b(invalid|not valid|missing|expired|incorrect)\b|\b(invalid|incorrect|missing) api[ _-]?key\b", re.I
)


class Setting(NamedTuple):
    """What to change in a config so that an endpoint takes its requests."""

    where: str
    fix: str


SETTINGS = {
    "max_tokens": Setting("model.max_tokens_field", "set model.max_tokens_field to max_completion_tokens"),
    "max_completion_tokens": Setting("model.max_tokens_field", "set model.max_tokens_field to max_tokens"),
    "temperature": Setting("sampling.temperature of task.yaml", "set it to 1: this model samples at no other"),
    "top_p": Setting("sampling.top_p of task.yaml", "set it to 1: this model samples at no other"),
    "logprobs": Setting("model.ask_logprobs", "set it to false; answers then come without a confidence"),
    "seed": Setting("sampling.seed of task.yaml", "leave it out"),
    "n": Setting("sampling.n of task.yaml", "set it to 1"),
    "response_format": Setting("answer of task.yaml", "take a model that writes by a JSON schema, or a schema that this one takes"),
}
MODEL = Setting("model.model", "set it to a name that the endpoint knows: GET <model.base_url>/models lists them")
KEY = Setting("$OPENAI_API_KEY", "set it to a valid key that may use this model")
SYSTEM = Setting("model.system_role", "set model.system_role to merge: the system message then stands before the first user message")


def refused_setting(text: str, sent: Mapping[str, Any]) -> Setting | None:
    """The setting that a body of status 400 or 422 blames, among those that were `sent`; None when it blames something else."""
    error = _error(text)
    words = str(error.get("message") or "")
    if any(message["role"] == "system" for message in sent["messages"]) and _SYSTEM.search(words):
        return SYSTEM
    if _UNKNOWN.search(words) or str(error.get("code")).startswith("unsupported"):
        named = [error.get("param"), *re.findall(r"[\"'`]([a-z_]+)[\"'`]", words), *re.findall(r": ([a-z_]+)$", words)]
        if found := next((SETTINGS[name] for name in named if name in SETTINGS and name in sent), None):
            return found
    if _NO_MODEL.search(words) or error.get("code") in _MODEL_CODES:
        return MODEL
    return KEY if _NO_KEY.search(words) else None


def _error(text: str) -> dict[str, Any]:
    """The error object of a body, whatever wraps it; its message alone when it is none."""
    try:
        body = json.loads(text)
    except ValueError:
        return {"message": text}
    body = body[0] if isinstance(body, list) and body else body
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        return {**error, "message": error.get("message") or error.get("detail") or error.get("msg")}
    return {"message": error}


def completion_of_chat(row: int, body: Any, samples: int = 1) -> Completion:
    """The Completion in a chat-completions body of `samples` choices. KeyError, TypeError or ValueError when it is something else."""
    if not isinstance(body, dict) or body.get("error"):
        raise ValueError("an error body")
    if not body.get("choices"):
        raise ValueError("no choices")
    choices = sorted(body["choices"], key=lambda choice: int(choice.get("index") or 0))
    if len(choices) != samples:  # it knows no `n`: asking again would not help
        return Completion(row, finish_reason="error", error=f"the endpoint gave {len(choices)} samples, not the {samples} asked for")
    usage = body.get("usage") or {}
    tokens_in, tokens_out = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    first, *others = (_choice(row, choice, tokens_out // samples) for choice in choices)
    cached = _count(usage.get("prompt_tokens_details") or {}, "cached_tokens")
    rest = tokens_out - sum(other.tokens_out for other in others)  # all that the usage says is counted once
    return replace(first, tokens_in=tokens_in, tokens_cached=cached, tokens_out=max(0, rest), samples=tuple(others))


def _choice(row: int, choice: dict[str, Any], tokens_out: int) -> Completion:
    """One sample. `tokens_out` is for when its tokens are not listed."""
    message, reason = choice["message"], str(choice["finish_reason"])[:_FINISH_CHARS].encode("utf-8", "replace").decode()
    refused = bool(message.get("refusal"))
    text = message["refusal"] if refused else message["content"]
    no_text = ""
    if text is None:
        reasoning = next((name for name in _REASONING if message.get(name)), "")
        if reason not in _SPEAKS and not reasoning:
            raise ValueError("no content")
        no_text = f"the message has no content; the model wrote into `{reasoning}` alone" if reasoning else ""
        text = ""  # all of it was reasoning, or a call of a tool: no answer, and asking again would bring the same
    if not isinstance(text, str):
        return Completion(row, finish_reason="error", error=f"the answer is a {type(text).__name__}, not text")
    texts, logprobs = _logprobs(choice.get("logprobs"))
    return Completion(
        id=row,
        text=hide(text),  # an endpoint that repeats what it was sent
        finish_reason="content_filter" if refused else reason,
        tokens_out=len(texts) or tokens_out,
        token_texts=() if refused else texts,
        token_logprobs=() if refused else logprobs,
        no_text=no_text,
    )


def _count(usage: Mapping[str, Any], name: str) -> int:
    """Tokens under `name`, 0 when the endpoint does not say. ValueError for what is no number of tokens: money is computed from it."""
    value = usage.get(name)
    try:
        count = int(value or 0)
    except (TypeError, ValueError, OverflowError):
        count = -1
    if not 0 <= count <= _MOST_TOKENS:
        raise ValueError(f"usage.{name} is {str(value)[:40]}")
    return count


def _logprobs(said: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The tokens of an answer and their log-probs. None of them where one cannot be a log-prob: the answer then has no confidence."""
    try:
        tokens = (said or {}).get("content") or []
        texts, logprobs = tuple(str(token["token"]) for token in tokens), tuple(float(token["logprob"]) for token in tokens)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return (), ()
    return (texts, logprobs) if all(math.isfinite(one) and one <= _ROUNDING for one in logprobs) else ((), ())
