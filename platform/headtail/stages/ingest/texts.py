"""Raw texts to queries: most are counted as they stand and cleaned once for all their events, whole columns at a time.

In: distinct raw texts as bytes. Out: at first sight, which of them cannot be a query, with the text to count the others by
(`screen_texts`); later the normalised, redacted queries with their keys, and which rules changed each (`clean_texts`). Both are
`normalise` and `redact`, to the letter: what is not plain ASCII goes through these. Knows nothing of rows, days or files.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.keys import normalise, query_key
from headtail.core.redact import redact
from headtail.core.rows import KEY
from headtail.stages.ingest.result import RuleName

NOT_UTF8, EMPTY, TOO_LONG, NUL = 1, 2, 3, 4  # reasons; 0: none
EMAIL, PHONE, CARD = 1, 2, 4  # marks
RULES: tuple[RuleName, ...] = get_args(RuleName)  # in the order in which they are applied; bit i of a text's rules is RULES[i]
_BLANKS, _CASE, _CHARACTERS, _PERSONAL = (1 << bit for bit in range(len(RULES)))
_PIECE = 1 << 16  # texts looked at at once
_REMEMBERED_BYTES = 1000  # of the longest text that is remembered
_SHORTEST = 7  # digits of the shortest number that is redacted; without as many, only an at sign makes a text worth a look
Bits = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class RawTexts(NamedTuple):
    """Distinct raw texts at first sight. `texts[i]`: what to count text i by; text i is no query where `reasons[i]` > 0."""

    texts: pa.Array
    reasons: Bits
    rules: Bits  # those that stand for text i's way to `texts[i]`
    marks: Bits  # EMAIL | PHONE | CARD that were taken out on that way


class CleanTexts(NamedTuple):
    """Queries of texts that `screen_texts` let pass. `rules` and `marks`: what was done here."""

    queries: pa.Array
    rules: Bits
    marks: Bits


def screen_texts(raw: pa.Array, max_chars: int, redacting: bool) -> RawTexts:
    """Which of `raw` (binary) are no queries. Printable ASCII of a fair length is one, and stands as it is; all else is cleaned here."""
    reasons, rules, marks = (np.zeros(len(raw), np.uint8) for _ in range(3))
    raw = pc.fill_null(raw, b"")
    data, starts, ends = _bytes_of(raw)
    sizes = ends - starts
    hard = (sizes == 0) | (sizes > max_chars)
    hard[np.searchsorted(ends, np.flatnonzero(data - np.uint8(0x20) > 0x5E), side="right")] = True
    if len(data):
        hard |= data[np.minimum(starts, len(data) - 1)] == 0x20  # perhaps there is nothing but blanks
    rows = np.flatnonzero(hard)
    if not len(rows):
        return RawTexts(raw, reasons, rules, marks)
    texts = list[bytes]()
    for row, value in zip(rows, raw.take(pa.array(rows)).to_pylist(), strict=True):
        way = _remembered if len(value) <= _REMEMBERED_BYTES else _cleaned
        text, reasons[row], rules[row], marks[row] = way(value, max_chars, redacting)
        texts.append(text)
    return RawTexts(pc.replace_with_mask(raw, pa.array(hard), pa.array(texts, pa.binary())), reasons, rules, marks)


def clean_texts(texts: pa.Array, redacting: bool) -> CleanTexts:
    """The queries of texts (binary) of `screen_texts`: its own non-ASCII is clean already, ASCII takes a capital, blanks or redaction."""
    pieces = [_clean_piece(texts.slice(start, _PIECE), redacting) for start in range(0, len(texts), _PIECE)]
    if not pieces:
        return CleanTexts(pa.nulls(0, pa.string()), np.zeros(0, np.uint8), np.zeros(0, np.uint8))
    queries, rules, marks = zip(*pieces, strict=True)
    return CleanTexts(pa.concat_arrays(queries), np.concatenate(rules), np.concatenate(marks))


def query_keys(queries: pa.Array) -> pa.Array:
    """The key of each query."""
    return pa.Array.from_buffers(KEY, len(queries), [None, pa.py_buffer(b"".join(map(query_key, queries.to_pylist())))])


def _clean_piece(texts: pa.Array, redacting: bool) -> CleanTexts:
    data, starts, ends = _bytes_of(texts)
    plain = ~_have(data > 0x7E, starts)
    blank = data == 0x20
    double = blank.copy()
    double[1:] &= blank[:-1]
    double[starts] = False  # two texts side by side
    odd = plain & (_have(double, starts) | blank[starts] | blank[ends - 1])
    capital = plain & _have(data - np.uint8(0x41) < 26, starts)
    rules = np.where(odd, _BLANKS, 0).astype(np.uint8) | np.where(capital, _CASE, 0).astype(np.uint8)
    queries = texts.cast(pa.string())
    if odd.any():
        some = pc.replace_substring_regex(pc.ascii_trim_whitespace(queries.filter(pa.array(odd))), "  +", " ")
        queries = pc.replace_with_mask(queries, pa.array(odd), some)
    if capital.any():
        queries = pc.replace_with_mask(queries, pa.array(capital), pc.ascii_lower(queries.filter(pa.array(capital))))
    marks = np.zeros(len(texts), np.uint8)
    if redacting:
        digits = np.add.reduceat(data - np.uint8(0x30) < 10, starts, dtype=np.int32)
        queries = _redact(queries, plain & (_have(data == 0x40, starts) | (digits >= _SHORTEST)), rules, marks)
    return CleanTexts(queries, rules, marks)


def _redact(queries: pa.Array, maybe: Mask, rules: Bits, marks: Bits) -> pa.Array:
    """`queries` without personal data, which those marked `maybe` alone can hold; notes it in `rules` and `marks`."""
    rows = np.flatnonzero(maybe)
    if not len(rows):
        return queries
    texts = list[str]()
    for row, text in zip(rows, queries.take(pa.array(rows)).to_pylist(), strict=True):
        redaction = redact(text)
        texts.append(redaction.text)
        marks[row] = EMAIL * redaction.email | PHONE * redaction.phone | CARD * redaction.card
        rules[row] |= _PERSONAL * redaction.any
    return pc.replace_with_mask(queries, pa.array(maybe), pa.array(texts, pa.string()))


def _cleaned(value: bytes, max_chars: int, redacting: bool) -> tuple[bytes, int, int, int]:
    """(query, 0, rules, marks) or (b"", reason, 0, 0)."""
    if b"\0" in value:
        return b"", NUL, 0, 0
    if len(value) > 64 * max_chars:  # a megabyte is not worth normalising
        return b"", EMPTY if not value.strip() else TOO_LONG, 0, 0
    try:
        raw = value.decode("utf-8")
    except UnicodeDecodeError:
        return b"", NOT_UTF8, 0, 0
    text = normalise(raw)
    if not text or len(text) > max_chars:
        return b"", TOO_LONG if text else EMPTY, 0, 0
    single = " ".join(raw.split())
    folded = single.casefold()
    rules = _BLANKS * (single != raw) | _CASE * (folded != single) | _CHARACTERS * (text != folded)
    if not redacting:
        return text.encode(), 0, rules, 0
    redaction = redact(text)
    marks = EMAIL * redaction.email | PHONE * redaction.phone | CARD * redaction.card
    return redaction.text.encode(), 0, rules | _PERSONAL * redaction.any, marks


_remembered = lru_cache(1 << 15)(_cleaned)


def _bytes_of(array: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The bytes of all texts one after the other, and where each begins and ends."""
    _, bounds, data = array.buffers()
    offsets = np.frombuffer(bounds, np.int32)[array.offset : array.offset + len(array) + 1] if len(array) else np.zeros(1, np.int32)
    whole = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data is not None else np.zeros(0, np.uint8)
    return whole, offsets[:-1] - offsets[0], offsets[1:] - offsets[0]


def _have(mask: Mask, starts: npt.NDArray[np.int32]) -> Mask:
    """Whether any byte of each text is marked; no text is empty."""
    return np.asarray(np.logical_or.reduceat(mask, starts))
