"""Output guardrails: may this answer be served to this query? Pure.

In: a task, a query (normalised), a parsed answer that is valid under the schema, perhaps how often the log has each word.
Out: "" or a reason code of GUARDRAIL_REASONS. A span's text must be in the query, or correct it: near to what was typed, and known.
Personal data that the query does not have is never served. Used at publish (the answer is withheld) and live (the answer is
degraded), so that both decide the same. Knows nothing of stores, snapshots or servers.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field
from rapidfuzz.distance import OSA

from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.core.own_code import own_code
from headtail.core.redact import redact
from headtail.core.score import ScoreConfig, answer_fields
from headtail.core.secrets import hide
from headtail.core.text import normalise

if TYPE_CHECKING:
    from headtail.core.task import Task

GUARDRAIL_REASONS = {
    "span_not_in_query": "a span has words that are neither in the query nor a correction of it",
    "query_not_covered": "words of the query are in no span",
    "span_order": "the spans are not in the order of the query",
    "correction_far": "a correction is too far from what was typed",
    "correction_unknown": "a correction has a word that the log does not know",
    "correction_of_known": "a word that the log knows was replaced by one that is not clearly more frequent",
    "personal_data": "the answer has an e-mail address, card number or telephone number that the query does not have",
    "check": "the task's own check refused the answer; `check.<word>` where it gave a word, `check.failed` where it raised an error",
}
_log = logging.getLogger("headtail.guardrails")
OwnCheck = Callable[[str, Any], str]  # (query, answer) -> "" or why not, in a word
_CODE = re.compile(r"[a-z][a-z0-9_]{0,40}")
_PIECES = 4  # words of one text that may be one word of the other: `nearme`, and spans within a text without blanks


class GuardrailConfig(Config):
    """What an answer must show before it is served."""

    enabled: bool | None = Field(None, description="null: on for tasks whose score is spans, off for all others")
    cover: Literal["some", "all"] = Field(
        "some", description="all: the spans, in order, are the whole query; some: each span is a piece of the query, in any order"
    )
    correction: str = Field(
        "", description="field of the answer that holds the corrected query; spans must then be pieces of it. Empty: the spans correct"
    )
    max_edits: int = Field(
        2, ge=0, le=4, description="typing errors that a correction may mend in a word (insertion, deletion, replacement, swap)"
    )
    letters_per_edit: int = Field(
        4, ge=1, le=50, description="letters that a word needs for each mended error: below 4 letters none is mended, below 8 one"
    )
    known_count: int = Field(5, ge=1, description="events from which a word of the log is known; a correction's new words must be known")
    known_ratio: float = Field(
        5.0, ge=1, description="a known word is replaced only by a word that is this many times as frequent in the log"
    )
    personal_data: bool = Field(True, description="refuse e-mail addresses, card and telephone numbers that the query does not have")
    check: str = Field(
        "",
        pattern=r"^$|^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="module:function(query, answer) of an installed package; returns empty, or a word for what is wrong. "
        "It runs where answers are published and served, and needs allow_task_code: true there",
    )


@dataclass(frozen=True)
class AnswerGuard:
    """The guardrails of one task. `words`: events by word of the log; without them no word is looked up."""

    task: Task
    words: Mapping[str, int] | None = None
    own_check: OwnCheck | None = None

    @cached_property
    def active(self) -> bool:
        """Whether there is anything to check."""
        enabled = self.task.file.guardrails.enabled
        return self.task.file.score.kind == "spans" if enabled is None else enabled

    def reason(self, query: str, answer: Any) -> str:
        """A reason code, or "" when `answer` may be served to `query`."""
        if not self.active:
            return ""
        config = self.task.file.guardrails
        found = self._spans(query, answer) if self.task.file.score.kind == "spans" or config.correction else ""
        if not found and config.personal_data and any(_is_leak(text, query) for text in texts_of(answer)):
            found = "personal_data"
        if not found and self.own_check is not None and (said := self.own_check(query, answer)):
            found = f"check.{said}" if _CODE.fullmatch(said) else "check"
        return found

    def _spans(self, query: str, answer: Any) -> str:
        config, score = self.task.file.guardrails, self.task.file.score
        spans = []
        if score.kind == "spans":
            segments = answer.get(score.field) or []
            spans = [text for segment in segments if isinstance(text := segment.get(score.text), str)]
        if " ".join(spans) == query and not config.correction:
            return ""  # nine answers of ten, at a microsecond each
        typed = _words(query)
        if config.correction:
            corrected = _words(normalise(str(answer.get(config.correction) or "")))
            problem = self._corrects(typed, corrected, whole=True)
            if problem:
                return problem
            return _pieces(corrected, " ".join(corrected), [normalise(text) for text in spans], whole=config.cover == "all")
        if config.cover == "all":
            return self._corrects(typed, _words(normalise(" ".join(spans))), whole=True)
        outside = (text for text in map(normalise, spans) if not _within(text, query))
        return next((found for text in outside if (found := self._corrects(typed, _words(text), whole=False))), "")

    def _corrects(self, typed: Sequence[str], given: Sequence[str], whole: bool) -> str:
        near = Near(self._typing_errors, self.task.file.guardrails.max_edits)
        steps = align_spellings(typed, given, near, whole)
        if steps is None:
            return _blame(typed, given, near, whole)
        return next((found for step in steps if step.typed != step.given and (found := self._vocabulary(step))), "")

    def _typing_errors(self, typed: str, given: str) -> int | None:
        """Typing errors between two words; None when there are too many. A number is never corrected."""
        config = self.task.file.guardrails
        if typed == given:
            return 0
        most = min(config.max_edits, min(len(typed), len(given)) // config.letters_per_edit)
        if abs(len(typed) - len(given)) > most:
            return None
        errors = OSA.distance(typed, given, score_cutoff=most)
        return errors if errors <= most and _digits(typed) == _digits(given) else None

    def _vocabulary(self, step: Step) -> str:
        """Whether the log speaks for a correction: its words are known, and more frequent than known words that it replaces."""
        config = self.task.file.guardrails
        if not self.words:
            return ""
        new = [self.words.get(word, 0) for word in step.given if word not in step.typed and _has_case(word)]
        if min(new, default=config.known_count) < config.known_count:
            return "correction_unknown"
        old = [self.words.get(word, 0) for word in step.typed if word not in step.given and _has_case(word)]
        known = bool(old) and min(old) >= config.known_count
        return "correction_of_known" if step.errors and new and known and min(new) < config.known_ratio * max(old) else ""


def check_guardrails(config: GuardrailConfig, score: ScoreConfig, outline: Mapping[str, Any], where: str) -> None:
    """ConfigError for guardrails that this task cannot have. `outline`: an Outline's schema, see `schema`."""
    if config.correction and config.correction not in (known := answer_fields(outline)):
        fix = f"the answer schema has {', '.join(known) or 'none'} there"
        raise ConfigError("field guardrails.correction: not in the answer schema", where=where, value=config.correction, fix=fix)
    if config.cover == "all" and score.kind != "spans":
        fix = "leave it out: only answers with score.kind spans have spans"
        raise ConfigError("field guardrails.cover: this task has no spans", where=where, value=config.cover, fix=fix)


def load_own_check(task: Task, allow_code: bool) -> OwnCheck | None:
    """The function that `guardrails.check` names; None when it names none. ConfigError when code is not allowed, or there is no such."""
    name = task.file.guardrails.check
    if not name:
        return None
    where = f"task {task.name}, guardrails.check"
    if not allow_code:
        fix = "set allow_task_code: true (--set allow_task_code=true) if you trust the task's author, or leave guardrails.check out"
        raise ConfigError("this task's guardrails name Python code, which would run on every answer", where=where, value=name, fix=fix)
    module, _, function = name.partition(":")
    fix = "name a function(query, answer) of a package that is installed where answers are published and served"
    with own_code(name, where, fix):
        found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise ConfigError("not a function", where=where, value=name, fix=fix)

    def check(query: str, answer: Any) -> str:
        try:
            return str(found(query, answer) or "")
        except Exception as error:  # an answer that could not be checked is not served
            _log.warning("guardrails.check %s failed: %s: %s", name, type(error).__name__, hide(str(error))[:300])
            return "failed"

    return check


def texts_of(answer: Any) -> Iterator[str]:
    """Every text in a parsed answer, names of fields left out."""
    if isinstance(answer, str):
        yield answer
    elif isinstance(answer, dict | list):
        for part in answer.values() if isinstance(answer, dict) else answer:
            yield from texts_of(part)


class Step(NamedTuple):
    """Some words of the query and the words that stand for them."""

    typed: tuple[str, ...]
    given: tuple[str, ...]
    errors: int


class Near(NamedTuple):
    """`errors`: typing errors between two words, None for too many. `slack`: letters by which words that are near may differ in length."""

    errors: Callable[[str, str], int | None]
    slack: int


def align_spellings(typed: Sequence[str], given: Sequence[str], near: Near, whole: bool) -> list[Step] | None:
    """`given` beside `typed`, word by word in order, with the fewest typing errors; None when they cannot be aligned.

    A step is one word for one, one for up to four, or up to four for one (`nearme` and `near me`). `whole`: all of `typed` is used;
    else `given` stands for any run of its words. Edit distance over words (Wagner and Fischer 1974).
    """
    n, m = len(typed), len(given)
    typed_at, given_at = (list(itertools.accumulate(map(len, words), initial=0)) for words in (typed, given))  # letters before each word
    best: dict[tuple[int, int], tuple[int, int, Step | None]] = {(i, 0): (0, i, None) for i in range(1 if whole else n + 1)}
    for j in range(1, m + 1):
        for i in range(1, n + 1):
            for a, b in _SHAPES:
                before = best.get((i - a, j - b))
                if before is None or abs(typed_at[i] - typed_at[i - a] - given_at[j] + given_at[j - b]) > near.slack:
                    continue
                errors = _step_errors(typed[i - a : i], given[j - b : j], near)
                if errors is not None and ((i, j) not in best or before[0] + errors < best[i, j][0]):
                    best[i, j] = (before[0] + errors, i, Step(tuple(typed[i - a : i]), tuple(given[j - b : j]), errors))
    ends = [i for i in ((n,) if whole else range(n + 1)) if (i, m) in best]
    if not ends:
        return None
    i, j = min(ends, key=lambda end: best[end, m][0]), m
    steps: list[Step] = []
    while (step := best[i, j][2]) is not None:
        steps.append(step)
        i, j = i - len(step.typed), j - len(step.given)
    return steps[::-1]


def _step_errors(typed: Sequence[str], given: Sequence[str], near: Near) -> int | None:
    """Typing errors of a step. `in reno` is not `reno` with two errors: a word that was left out, or came in, is no error of typing."""
    errors = near.errors("".join(typed), "".join(given))
    if errors and len(typed) != len(given):
        one, several = (typed[0], given) if len(typed) == 1 else (given[0], typed)
        return None if any(near.errors(word, one) is not None for word in several) else errors
    return errors


_SHAPES = ((1, 1), *((1, b) for b in range(2, _PIECES + 1)), *((a, 1) for a in range(2, _PIECES + 1)))


def _blame(typed: Sequence[str], given: Sequence[str], near: Near, whole: bool) -> str:
    """The reason code of words that cannot be aligned."""
    alone = [word for word in given if align_spellings(typed, [word], near, whole=False) is None]
    if not whole:
        return "span_not_in_query" if len(alone) == len(given) else "correction_far" if alone else "span_order"
    alone = [word for word in alone if not _is_piece(word, typed)]
    left = [word for word in typed if align_spellings(given, [word], near, whole=False) is None and not _is_piece(word, given)]
    if alone and left:
        return "correction_far"
    if alone or (not left and len(given) > len(typed)):
        return "span_not_in_query"
    return "query_not_covered" if left or len(given) < len(typed) else "span_order"


def _is_piece(word: str, others: Sequence[str]) -> bool:
    return any(word in other for other in others)


def _pieces(source: Sequence[str], text: str, spans: Sequence[str], whole: bool) -> str:
    """Whether spans are pieces of a text, letter by letter."""
    if whole:
        words = _words(" ".join(spans))
        return "" if align_spellings(source, words, _SAME, whole=True) is not None else _blame(source, words, _SAME, whole=True)
    return next(("span_not_in_query" for span in spans if not _within(span, text)), "")


_SAME = Near(lambda one, other: 0 if one == other else None, 0)


def _words(text: str) -> list[str]:
    """The words of a normalised text without the signs around them; words of signs alone are none."""
    words = []
    for word in text.split():
        start, end = 0, len(word)
        while start < end and not _is_letter(word[start]):
            start += 1
        while end > start and not _is_letter(word[end - 1]):
            end -= 1
        words += [word[start:end]] if start < end else []
    return words


def _is_letter(character: str) -> bool:
    """A letter, digit or mark: vowel signs of Indic scripts are marks."""
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def _within(text: str, query: str) -> bool:
    """Whether `text` is a piece of `query` that cuts no word: of scripts without blanks (no letter has a case) any piece will do."""
    start = query.find(text)
    while start >= 0:
        end = start + len(text)
        if not (_joined(query[start - 1 : start], text[:1]) or _joined(text[-1:], query[end : end + 1])):
            return True
        start = query.find(text, start + 1)
    return False


def _joined(one: str, other: str) -> bool:
    return bool(one and other) and (_has_case(one) or one.isdigit()) and (_has_case(other) or other.isdigit())


def _has_case(word: str) -> bool:
    """Whether it has a letter of a script with large and small letters, whose words have blanks between them."""
    return word.upper() != word or word.lower() != word


def _digits(word: str) -> str:
    return "".join(character for character in word if character.isdigit())


def _is_leak(text: str, query: str) -> bool:
    """Whether a text of an answer has personal data that the query does not have."""
    if text in query:
        return False
    plain = normalise(text)
    return redact(plain).any and plain not in query
