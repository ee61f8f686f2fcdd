"""Answers as labels and back, for models that classify and do not write text. Pure.

In: a task's schema, queries and answers. Out: a Scheme (which fields are classes, which list is tagged words) and per query its
Tags; and the answer that labels stand for. Fits answers of enum, const, boolean or null fields and at most one list of
{text, label} pieces of the query, in order. Another schema is refused with the reason. A text that is spelt otherwise than the
query is aligned with it word by word and kept as corrections (after GECToR, Omelianchuk et al. 2020); an answer that labels cannot express
is marked: `Tags.exact` says whether the answer comes back unchanged. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field
from rapidfuzz.distance import OSA

from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.core.keys import canonical, fingerprint
from headtail.core.schema import resolve_reference
from headtail.core.spelling import MOST, similar

VERSION = 1  # part of every scheme; raise it when the same labels stand for another answer
OUTSIDE, BEGIN, INSIDE = 0, 1, 2  # of a word: in no piece, first of a piece, further in it
KEEP, DELETE, FIRST_FIX = 0, 1, 2  # corrections of a word: none, left out, then Scheme.corrections in order
NONE = -1  # no label: the word is outside, or the answer says nothing of it
ABSENT = ""  # among a field's values: the field is left out
RESPELT = 500
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without blanks: each is a word here
_WORD = re.compile(rf"[{_IDEOGRAPH}]|(?:(?![{_IDEOGRAPH}])\w)+|[^\w\s]")
# Costs of alignment: a word in no piece (hardly any, or odd readings would use it up), one left out inside a piece, a word of
# the answer that is not in the query, a word respelt, two words for one or one for two.
_OUT, _SKIP, _ADD, _CHANGE, _JOIN = 0.01, 0.6, 1.2, 0.5, 0.8
_NEVER = 1e9


class FieldHead(Config):
    """A field with a closed set of values."""

    name: str = Field(description="name of the field")
    values: tuple[str, ...] = Field(min_length=1, description="canonical JSON of each value; empty text: the field is left out")


class Spans(Config):
    """A list of pieces of the query."""

    name: str = Field(description="name of the list")
    text: str = Field(description="name of a piece's text")
    label: str = Field(description="name of a piece's label")
    labels: tuple[str, ...] = Field(min_length=1, description="canonical JSON of each label")
    text_first: bool = Field(True, description="whether the schema names the text before the label")


class Scheme(Config):
    """How labels express a task's answers. Kept beside the weights of a model that was trained on them."""

    form: int = Field(VERSION, description="version of what labels mean")
    schema_digest: str = Field(description="fingerprint of the answer schema")
    order: tuple[str, ...] = Field(description="fields of an answer in the order in which they are written")
    fields: tuple[FieldHead, ...] = Field((), description="fields with a closed set of values")
    spans: Spans | None = Field(None, description="the list of pieces, if there is one")
    corrections: tuple[str, ...] = Field((), description="spellings that a word of the query can be replaced by")
    deletes: bool = Field(False, description="whether a word inside a piece can be left out of its text")

    @property
    def fixes(self) -> int:
        """Classes of corrections, with keeping a word and leaving it out; none when words are always kept."""
        return FIRST_FIX + len(self.corrections) if self.corrections or self.deletes else 0


class Tags(NamedTuple):
    """One query's answer. Per word: kind, label (NONE outside) and correction; per field of the scheme: its value's number.

    `exact`: `answer` gives back the very answer that was encoded.
    """

    kinds: tuple[int, ...]
    labels: tuple[int, ...]
    fixes: tuple[int, ...]
    values: tuple[int, ...]
    exact: bool


def word_spans(query: str) -> list[tuple[int, int]]:
    """[start, end) of each word: a run of letters and digits, one ideograph, or one mark."""
    return [match.span() for match in _WORD.finditer(query)]


# --- which tasks fit


def scheme(schema: Mapping[str, Any], name: str = "task") -> Scheme:
    """The scheme of an answer schema, without corrections. ConfigError says which field does not fit."""
    top = resolve_reference(schema, schema)
    if top.get("type") != "object" or not top.get("properties"):
        _refuse(name, "answer", "is no object with named properties")
    required = set(top.get("required") or ())
    heads: list[FieldHead] = []
    spans: Spans | None = None
    for field, named in top["properties"].items():
        part = resolve_reference(named, schema)
        values = _values(part, schema)
        if values is not None:
            heads.append(FieldHead(name=field, values=(*values, *(() if field in required else (ABSENT,)))))
        elif part.get("type") == "array" and spans is None and field in required:
            spans = _spans(field, part, schema, name)
        else:
            _refuse(name, field, _why(part, spans is not None))
    return Scheme(schema_digest=fingerprint(schema), order=tuple(top["properties"]), fields=tuple(heads), spans=spans)


def _spans(field: str, part: Mapping[str, Any], root: Mapping[str, Any], task: str) -> Spans:
    item = resolve_reference(part.get("items") or {}, root)
    properties = {key: resolve_reference(child, root) for key, child in (item.get("properties") or {}).items()}
    texts = [key for key, child in properties.items() if child.get("type") == "string" and _values(child, root) is None]
    closed = [key for key, child in properties.items() if _values(child, root) is not None]
    if len(texts) != 1 or len(closed) != 1 or len(properties) != 2 or set(item.get("required") or ()) != set(properties):
        _refuse(task, field, "is a list, but not of pieces with one required text and one required label of a closed set")
    labels = _values(properties[closed[0]], root)
    assert labels is not None  # `closed` holds such alone
    return Spans(name=field, text=texts[0], label=closed[0], labels=labels, text_first=next(iter(properties)) == texts[0])


def _values(part: Mapping[str, Any], root: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Canonical JSON of each value that `part` allows, or None when they are not a closed set."""
    if "const" in part:
        return (canonical(part["const"]),)
    if "enum" in part:
        return tuple(dict.fromkeys(canonical(value) for value in part["enum"]))
    if part.get("type") in ("boolean", "null"):
        return ("false", "true") if part["type"] == "boolean" else ("null",)
    for group in ("anyOf", "oneOf"):
        if group in part:
            options = [_values(resolve_reference(option, root), root) for option in part[group]]
            return None if None in options else tuple(dict.fromkeys(value for option in options for value in option or ()))
    return None


def _why(part: Mapping[str, Any], taken: bool) -> str:
    if part.get("type") == "string":
        return "is free text, which labels cannot express"
    if part.get("type") in ("integer", "number"):
        return "is a number that is not of a closed set"
    if part.get("type") == "array":
        return "is a second list" if taken else "is a list that may be left out"
    return "is of a kind that labels cannot hold"


def _refuse(task: str, field: str, why: str) -> None:
    raise ConfigError(
        f"an encoder cannot answer this task: {field} {why}",
        where=task,
        fix="use student: decoder or seq2seq, or give the field an enum; docs/students.md says what fits",
    )


# --- corrections


def with_corrections(
    scheme: Scheme, rows: Iterable[tuple[str, Any]], limit: int, least: int = 2, letters: int = 4
) -> tuple[Scheme, dict[str, int]]:
    """`scheme` with the spellings that answers use: words of `letters` letters or more and all that replaced a word, by frequency.

    `rows`: queries and parsed answers. A spelling counts when `least` answers hold it; none do when hardly an answer (fewer than
    `least`, or one in RESPELT) is spelt otherwise than its query. Also returns how many rows hold each.
    """
    if scheme.spans is None or not limit:
        return scheme, {}
    counts: Counter[str] = Counter()
    left_out = respelt = asked = 0
    for query, given in rows:
        spoken = word_spans(query)
        texts = [query[a:b] for a, b in spoken]
        pieces = _pieces(scheme.spans, given)
        held = {text[a:b] for text, _ in pieces for a, b in word_spans(text) if b - a >= letters}
        steps = [step for step in _align(texts, pieces) if NONE not in (step.word, step.piece)]
        left_out += any(not step.text for step in steps)
        changed = {step.text for step in steps if step.text not in ("", texts[step.word])}
        respelt, asked = respelt + bool(changed), asked + 1
        counts.update(held | changed)
    if respelt < max(least, asked / RESPELT):
        return scheme.model_copy(update={"deletes": left_out >= least}), {}
    kept = [word for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if count >= least][:limit]
    update = {"corrections": tuple(kept), "deletes": left_out >= least}
    return scheme.model_copy(update=update), {word: counts[word] for word in kept}


# --- answer -> labels


class _Step(NamedTuple):
    """A word of the query (NONE: none), the piece it belongs to (NONE: none) and what it is spelt as."""

    word: int
    piece: int
    text: str


def encode_tags(scheme: Scheme, query: str, answer: Any, fixes: Mapping[str, int] | None = None) -> Tags:
    """The labels nearest to a parsed answer. `fixes`: number of each correction, to spare making it again for each row."""
    if fixes is None:
        fixes = fix_numbers(scheme)
    spoken = word_spans(query)
    kinds, labels, chosen = [OUTSIDE] * len(spoken), [NONE] * len(spoken), [KEEP] * len(spoken)
    if scheme.spans is not None:
        texts = [query[a:b] for a, b in spoken]
        pieces = _pieces(scheme.spans, answer)
        number = {label: i for i, label in enumerate(scheme.spans.labels)}
        last = NONE
        for step in _align(texts, pieces):
            if step.word == NONE or step.piece == NONE:
                continue
            at = step.word
            kinds[at] = INSIDE if step.piece == last else BEGIN
            labels[at] = number.get(pieces[step.piece][1], NONE)
            if step.text != texts[at]:
                chosen[at] = fixes.get(step.text, KEEP) if step.text else DELETE if scheme.deletes else KEEP
            last = step.piece
    values = tuple(_value(head, answer) for head in scheme.fields)
    made = Tags(tuple(kinds), tuple(labels), tuple(chosen), values, False)
    return made._replace(exact=_same(decode_tags(scheme, query, made), answer))


def fix_numbers(scheme: Scheme) -> dict[str, int]:
    """Number of each correction."""
    return {word: FIRST_FIX + i for i, word in enumerate(scheme.corrections)}


def _value(head: FieldHead, value: Any) -> int:
    held = canonical(value[head.name]) if isinstance(value, dict) and head.name in value else ABSENT
    return head.values.index(held) if held in head.values else NONE


def _pieces(spans: Spans, answer: Any) -> list[tuple[str, str]]:
    """(text, canonical label) of each piece of an answer."""
    value = answer.get(spans.name) if isinstance(answer, dict) else None
    pieces = value if isinstance(value, list) else []
    return [(str(piece.get(spans.text, "")), canonical(piece.get(spans.label))) for piece in pieces if isinstance(piece, dict)]


def _same(decoded: Any, answer: Any) -> bool:
    return canonical(decoded) == canonical(answer)


def _align(texts: Sequence[str], pieces: Sequence[tuple[str, str]]) -> list[_Step]:
    """The cheapest way to read the words of all pieces, in order, off the words of the query."""
    spelt = [(number, text[a:b], text, a, b) for number, (text, _) in enumerate(pieces) for a, b in word_spans(text)]
    n, m = len(texts), len(spelt)
    if list(texts) == [word for _, word, *_ in spelt]:  # the common case, 50 times faster
        return [_Step(at, piece, word) for at, (piece, word, *_) in enumerate(spelt)]
    cost = [[_NEVER] * (m + 1) for _ in range(n + 1)]
    came: list[list[tuple[int, int]]] = [[(0, 0)] * (m + 1) for _ in range(n + 1)]
    cost[0][0] = 0.0
    for i in range(n + 1):
        for j in range(m + 1):
            if cost[i][j] >= _NEVER:
                continue
            for di, dj in ((1, 1), (1, 0), (0, 1), (1, 2), (2, 1)):
                if i + di <= n and j + dj <= m:
                    inside = 0 < j < m and spelt[j - 1][0] == spelt[j][0]
                    price = cost[i][j] + _price(texts[i : i + di], spelt[j : j + dj], inside)
                    if price < cost[i + di][j + dj]:
                        cost[i + di][j + dj], came[i + di][j + dj] = price, (di, dj)
    steps: list[_Step] = []
    i, j = n, m
    while i or j:
        di, dj = came[i][j]
        i, j = i - di, j - dj
        steps += reversed(_steps(i, spelt[j : j + dj], di))
    return _fill_gaps(list(reversed(steps)))


_Spelt = tuple[int, str, str, int, int]  # piece, word, the piece's whole text, start and end of the word in it


def _price(texts: Sequence[str], spelt: Sequence[_Spelt], inside: bool) -> float:
    if not spelt:
        return _SKIP if inside else _OUT
    if not texts:
        return _ADD
    if len({piece for piece, *_ in spelt}) > 1:
        return _NEVER
    spelling, joined = _spelling(spelt), "".join(texts)
    if texts[0] == spelling and len(texts) == 1:
        return 0.0
    apart = OSA.distance(joined, spelling) if similar(texts[0], spelling) else MOST + 1
    if len(texts) == len(spelt):
        return _CHANGE + apart / (len(spelling) + 1) if apart <= MOST else _NEVER
    most = 1 if len(texts) > 1 else MOST  # a missing blank is one typing error
    return _JOIN + apart / (len(spelling) + 1) if apart <= most else _NEVER


def _spelling(spelt: Sequence[_Spelt]) -> str:
    return spelt[0][2][spelt[0][3] : spelt[-1][4]]


def _steps(at: int, spelt: Sequence[_Spelt], count: int) -> list[_Step]:
    if not spelt:
        return [_Step(at, NONE, "")]
    if not count:
        return [_Step(NONE, spelt[0][0], spelt[0][1])]
    first = _Step(at, spelt[0][0], _spelling(spelt))
    return [first, *(_Step(at + more, spelt[0][0], "") for more in range(1, count))]


def _fill_gaps(steps: list[_Step]) -> list[_Step]:
    """Words of the query that are skipped inside a piece belong to it and are left out of its text."""
    real = [at for at, step in enumerate(steps) if step.word != NONE]
    out = list(steps)
    for place, at in enumerate(real):
        if steps[at].piece != NONE:
            continue
        before = next((steps[k].piece for k in reversed(real[:place]) if steps[k].piece != NONE), NONE)
        after = next((steps[k].piece for k in real[place + 1 :] if steps[k].piece != NONE), NONE)
        if before == after != NONE:
            out[at] = _Step(steps[at].word, before, "")
    return out


# --- labels -> answer


def decode_tags(scheme: Scheme, query: str, tags: Tags) -> dict[str, Any]:
    """The answer that labels stand for. May break the schema's bounds (too many pieces): then it is no answer, see `Task.parse`."""
    plain: dict[str, Any] = {}
    if scheme.spans is not None:
        plain[scheme.spans.name] = [
            {scheme.spans.text: "".join(parts), scheme.spans.label: json.loads(scheme.spans.labels[label])}
            for _, parts, label in decode_pieces(scheme, query, word_spans(query), tags.kinds, tags.labels, tags.fixes)
        ]
    for head, value in zip(scheme.fields, tags.values, strict=True):
        if value != NONE and head.values[value] != ABSENT:
            plain[head.name] = json.loads(head.values[value])
    return {name: plain[name] for name in scheme.order if name in plain}


def decode_pieces(
    scheme: Scheme, query: str, spoken: Sequence[tuple[int, int]], kinds: Sequence[int], labels: Sequence[int], fixes: Sequence[int]
) -> list[tuple[int, list[str], int]]:
    """Each piece as its first word, the texts of its words (each with the gap before it; empty when left out) and its label.

    A piece begins at BEGIN, at INSIDE after OUTSIDE, and takes the label of its first word that has one. Pieces without text
    or label are none.
    """
    made: list[tuple[int, list[str], int]] = []
    begun, parts, label, end, empty = NONE, list[str](), NONE, 0, True
    for at, ((start, stop), kind, named, fix) in enumerate(zip(spoken, kinds, labels, fixes, strict=True)):
        if kind == BEGIN or (kind == INSIDE and begun == NONE):
            begun, parts, label, empty = at, [], NONE, True
            made.append((begun, parts, label))
        if kind == OUTSIDE:
            begun = NONE
            continue
        if label == NONE and named != NONE:
            label = named
            made[-1] = (begun, parts, label)
        if fix == DELETE:
            parts.append("")
        else:
            text = query[start:stop] if fix == KEEP else scheme.corrections[fix - FIRST_FIX]
            parts.append(text if empty else query[end:start] + text)
            empty = False
        end = stop
    return [(begun, parts, label) for begun, parts, label in made if label != NONE and any(parts)]
