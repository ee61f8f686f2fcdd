"""The result of one row: its state, its answer and its confidence. Pure.

In: a task, the I/O format in which a model answers it, and an engine's Completion. Out: a ParsedAnswer. Nothing is repaired: text
that stops at the length limit is truncated, text that is not valid under the schema is invalid, an error is failed.
Confidence is taken over decision tokens only: a grammar forces braces, keys and punctuation, and forced tokens look certain.
Knows nothing of tables, engines or retries.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from headtail.core.io_format import DEFAULT, ModelFormat
from headtail.core.rows import State
from headtail.core.secrets import hide
from headtail.core.task import Task
from headtail.engines import Completion

_REASON_CHARS = 500
_FENCE = re.compile(r"^\s*```", re.MULTILINE)  # a string of JSON holds no line break, so no line of an answer starts so

# A string, a number, a word, or one mark of JSON punctuation. In valid JSON a string before a colon is a key.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|[{}\[\],:]', re.DOTALL)


class ParsedAnswer(NamedTuple):
    """How a row ended. `answer` is canonical JSON and set only when answered; `raw` is the engine's text otherwise.

    With n > 1 samples, `agreement` is the share of them that gave this answer and `samples` holds each (rows.SAMPLE).
    """

    state: State
    answer: str | None
    confidence: float | None
    reason: str
    raw: str | None
    agreement: float | None = None
    samples: tuple[dict[str, Any], ...] | None = None


def classify(task: Task, completion: Completion, fmt: ModelFormat = DEFAULT) -> ParsedAnswer:
    """The state of one completion, with its answer and confidence or the reason why there is none.

    Of several samples the answer that most of them give is taken (self-consistency, Wang et al. 2022), the earliest of
    equals; when none is an answer, the row ends as its first sample did.
    """
    if completion.samples and not completion.error:
        return _elect(task, fmt, (completion, *completion.samples))
    return _classify_one(task, fmt, completion)


def _elect(task: Task, fmt: ModelFormat, completions: Sequence[Completion]) -> ParsedAnswer:
    answers = [_classify_one(task, fmt, completion) for completion in completions]
    votes = Counter(parsed.answer for parsed in answers if parsed.answer is not None)
    samples = tuple(
        {
            "answer": parsed.answer,
            "state": str(parsed.state),
            "finish_reason": completion.finish_reason,
            "tokens_out": completion.tokens_out,
            "confidence": parsed.confidence,
        }
        for parsed, completion in zip(answers, completions, strict=True)
    )
    if not votes:
        return answers[0]._replace(agreement=0.0, samples=samples)
    answer, count = votes.most_common(1)[0]
    chosen = next(parsed for parsed in answers if parsed.answer == answer)
    return chosen._replace(agreement=count / len(answers), samples=samples)


def _classify_one(task: Task, fmt: ModelFormat, completion: Completion) -> ParsedAnswer:
    if completion.error:
        return _without(State.FAILED, completion.error, completion)
    if completion.finish_reason == "content_filter":
        return _without(State.REFUSED, "the model or its provider declined", completion)
    if completion.finish_reason == "length":
        return _without(State.TRUNCATED, f"stopped at the length limit after {completion.tokens_out} tokens", completion)
    if completion.finish_reason != "stop":
        return _without(State.FAILED, f"ended with finish reason {completion.finish_reason!r}, not stop", completion)
    parsed = fmt.parse_text(task, completion.text)
    if parsed.problem:
        return _without(State.INVALID, _name_cause(parsed.problem, completion), completion)
    sure = confidence(completion.text, completion.token_texts, completion.token_logprobs, parsed.spans)
    return ParsedAnswer(State.ANSWERED, task.dump(parsed.answer), sure, "", None)


def _name_cause(problem: str, completion: Completion) -> str:
    """`problem`, or in its place the common cause that the parser's words do not tell."""
    if not problem.startswith("not JSON"):
        return problem
    if not completion.text.strip():
        return f"not JSON: {completion.no_text or 'the message has no content'}"
    if _FENCE.search(completion.text):
        return "not JSON: the answer is inside a Markdown fence (```)"
    return problem


def _without(state: State, reason: str, completion: Completion) -> ParsedAnswer:
    return ParsedAnswer(state, None, None, _storable(hide(reason)[:_REASON_CHARS]), _storable(completion.text) or None)


def _storable(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair: it is no character, and no column of text holds it."""
    return text.encode("utf-8", "replace").decode()


def confidence(
    text: str, token_texts: Sequence[str], token_logprobs: Sequence[float], spans: Sequence[tuple[int, int]] | None = None
) -> float | None:
    """Geometric mean probability (0..1) of the tokens that overlap a decision: `spans`, or the scalar values of JSON `text`.

    A last token without text (the end of the answer) counts when a span ends beyond the text: to stop there was a decision.
    None without log-probs, when the tokens do not spell `text`, or when nothing was decided: no figure is better than a
    wrong one. A mean and not a product: a product of probabilities falls with length alone.
    """
    if not token_logprobs or len(token_logprobs) != len(token_texts) or "".join(token_texts) != text:
        return None
    spans = scalar_spans(text) if spans is None else spans
    total, count, place, at = 0.0, 0, 0, 0
    for piece, logprob in zip(token_texts, token_logprobs, strict=True):
        start, place = place, place + len(piece)
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        if at < len(spans) and spans[at][0] < place and start < place:
            total, count = total + logprob, count + 1
    if spans and spans[-1][1] > len(text) and not token_texts[-1]:
        total, count = total + token_logprobs[-1], count + 1
    return min(1.0, math.exp(total / count)) if count else None


def scalar_spans(text: str) -> list[tuple[int, int]]:
    """The [start, end) of every scalar value in JSON `text`, in order. Keys and punctuation are left out.

    A string's span runs from after its opening quote through its closing quote: where to stop is a decision too.
    """
    spans: list[tuple[int, int]] = []
    pending: tuple[int, int] | None = None
    for match in _TOKEN.finditer(text):
        mark = match.group()
        if mark == ":":
            pending = None  # what came before was a key
            continue
        if pending is not None:
            spans.append(pending)
            pending = None
        if mark[0] == '"':
            pending = (match.start() + 1, match.end())
        elif mark not in "{}[],":
            spans.append(match.span())
    return spans if pending is None else [*spans, pending]
