"""Answers as labels that a small model can learn: one per field, or one per word of the query.

In: a task, queries and answers. Out: for label-like answers a label per field; for spans a tag per word (B-topic, I-topic, O)
with what does not fit: words of the answer that are not in the query, words of the query that no segment holds.
Answers that are neither (free text, nested lists) have no such form: `None`. Knows nothing of models or scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, NamedTuple

from headtail.core.keys import canonical
from headtail.core.task import Task

OUTSIDE = "O"
_ALIKE = 0.5  # similarity of two spellings from which one is taken to be the other's correction


class Word(NamedTuple):
    """A word of the query, its tag, and what the answer writes for it."""

    text: str
    tag: str
    written: str


class TaggedQuery(NamedTuple):
    """An answer of segments aligned with its query."""

    words: tuple[Word, ...]
    absent: tuple[str, ...]  # words of the answer that are like no word of the query
    kind: str  # the labels used, as one text


def label_fields(task: Task) -> tuple[str, ...]:
    """The fields whose values are labels: the scored one, or every field of a flat answer that is an enum or a boolean."""
    if task.file.score.kind == "label":
        return (task.file.score.field,)
    if task.file.score.kind == "spans":
        return ()
    fields = task.schema.get("properties") or {}
    return tuple(name for name, kind in fields.items() if "enum" in kind or kind.get("type") == "boolean")


def field_labels(answer: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """The label in each field, as canonical JSON."""
    return tuple(canonical(answer.get(name), name) for name in fields)


def tag(task: Task, query: str, answer: Mapping[str, Any]) -> TaggedQuery:
    """Lay the segments of `answer` over the words of `query`. Corrected words are matched to the words they correct."""
    names = task.file.score
    found = answer.get(names.field)
    segments = [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []
    labels = [str(segment.get(names.label)) for segment in segments]
    written = [(word, place) for place, segment in enumerate(segments) for word in str(segment.get(names.text) or "").casefold().split()]
    words = query.split(" ")
    matched = align_words(words, [word for word, _ in written])
    tags, previous, shown = [], None, list(words)
    for at in range(len(words)):
        source = matched[at]
        if source is None:
            tags.append(OUTSIDE)
            previous = None
            continue
        shown[at], place = written[source]
        tags.append(f"{'I' if place == previous else 'B'}-{labels[place]}")
        previous = place
    used = {source for source in matched if source is not None}
    absent = tuple(word for number, (word, _) in enumerate(written) if number not in used)
    return TaggedQuery(tuple(map(Word, words, tags, shown)), absent, "+".join(sorted(set(labels))))


def untag(task: Task, words: Sequence[str], tags: Sequence[str]) -> dict[str, Any]:
    """The answer that these tags stand for, `words` being what is written for each word."""
    names = task.file.score
    segments: list[dict[str, str]] = []
    opened = ""
    for word, mark in zip(words, tags, strict=True):
        label = mark[2:]
        if mark == OUTSIDE:
            opened = ""
        elif mark[0] == "I" and opened == label:
            segments[-1][names.text] += f" {word}"
        else:
            segments.append({names.text: word, names.label: label})
            opened = label
    return {names.field: segments}


def align_words(words: Sequence[str], written: Sequence[str]) -> list[int | None]:
    """For each word of the query the place in `written` of the word that stands for it: equal, or alike in the same gap."""
    if list(words) == list(written):
        return list(range(len(words)))
    places: list[int | None] = [None] * len(words)
    free: list[int] = []
    for kind, a, b, c, d in SequenceMatcher(None, words, written, autojunk=False).get_opcodes():
        if kind == "equal":
            places[a:b] = range(c, d)
        elif kind == "replace":
            free += _pair(words, written, range(a, b), range(c, d), places)
        else:
            free += range(c, d)
    for place in free:  # segments out of order
        at = next((i for i, word in enumerate(words) if places[i] is None and word == written[place]), None)
        if at is not None:
            places[at] = place
    return places


def _pair(words: Sequence[str], written: Sequence[str], left: range, right: range, found: list[int | None]) -> list[int]:
    """Match alike words of a gap in order, the most alike first of each; the places of `right` that nothing is like."""
    if len(left) == len(right) and all(word_similarity(words[i], written[j]) >= _ALIKE for i, j in zip(left, right, strict=True)):
        for i, j in zip(left, right, strict=True):
            found[i] = j
        return []
    free = []
    for j in right:
        best = max((i for i in left if found[i] is None), key=lambda i: word_similarity(words[i], written[j]), default=None)
        if best is not None and word_similarity(words[best], written[j]) >= _ALIKE:
            found[best] = j
        else:
            free.append(j)
    return free


@lru_cache(65_536)
def word_similarity(a: str, b: str) -> float:
    """0..1: twice the characters in common, in order, over all."""
    return SequenceMatcher(None, a, b, autojunk=False).ratio()
