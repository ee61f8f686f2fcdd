"""What a shard asks for: its input rows, one per (query_key, answer_key), with their messages.

In: a shard's input table. Out: ShardRequests: the rows as a table and, by position, messages and keys. Rows that ask the same are
one row; a human label in any table makes it eval_only. A template that raises fails its own row alone. Knows nothing of engines or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.errors import LedgerError
from headtail.core.io_format import DEFAULT, ModelFormat
from headtail.core.keys import answer_key
from headtail.core.rows import KEY, State, key_words
from headtail.core.task import Task

_LISTED = 5
_STATES = {str(state) for state in State}
Pair = tuple[bytes, bytes]  # query_key, answer_key


@dataclass
class ShardRequests:
    """Rows to be answered, in order of input. `place` finds a row by its pair; `unrendered` says why a row has no messages."""

    table: pa.Table
    messages: list[list[dict[str, str]]]
    pairs: list[Pair]
    duplicates: int = 0
    unrendered: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = {pair: row for row, pair in enumerate(self.pairs)}

    def __len__(self) -> int:
        return len(self.pairs)


def shard_requests(table: pa.Table, task: Task, settings: str, fmt: ModelFormat = DEFAULT) -> ShardRequests:
    """The rows of one shard's input, rendered in the model's format `fmt` and keyed under `settings`."""
    queries, keys = table["query"].to_pylist(), table["query_key"].to_pylist()
    sides = [table[name].to_pylist() for name in task.side_inputs]
    names = task.side_inputs
    made: list[list[dict[str, str]]] = []
    pairs: list[Pair] = []
    unrendered: dict[int, str] = {}
    kept: list[int] = []
    first: dict[Pair, int] = {}
    again: list[tuple[int, int]] = []  # position of a duplicate, position of the row it doubles
    for at, query in enumerate(queries):
        try:
            messages, problem = fmt.messages(task, query, {name: side[at] for name, side in zip(names, sides, strict=True)}), ""
        except Exception as error:  # templates are the user's, and can raise anything: this row's fault alone
            messages, problem = [{"role": "unrendered", "content": query}], f"prompt template: {type(error).__name__}: {error}"
        pair = keys[at], answer_key(messages, settings)
        if (earlier := first.setdefault(pair, len(pairs))) < len(pairs):
            again.append((at, earlier))
            continue
        if problem:
            unrendered[len(pairs)] = problem
        pairs.append(pair)
        made.append(messages)
        kept.append(at)
    rows = table if not again else _eval_only(table.take(pa.array(kept, pa.int64())), table, again)
    return ShardRequests(rows.combine_chunks(), made, pairs, len(again), unrendered)


def _eval_only(rows: pa.Table, table: pa.Table, again: Sequence[tuple[int, int]]) -> pa.Table:
    """`rows` with `eval_only` set where a duplicate was eval_only."""
    labels = np.asarray(pc.fill_null(table["eval_only"], False))
    held = np.array(pc.fill_null(rows["eval_only"], False))
    for at, earlier in again:
        held[earlier] |= labels[at]
    return rows.set_column(rows.column_names.index("eval_only"), "eval_only", pa.array(held))


def sort_answers(table: pa.Table) -> pa.Table:
    """`table` sorted by (query_key, answer_key)."""
    return table.take(pa.array(_order(table["query_key"], table["answer_key"])))


def _order(query_keys: pa.Array | pa.ChunkedArray, answer_keys: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(np.lexsort((*key_words(answer_keys)[::-1], *key_words(query_keys)[::-1])))


def check_rows(table: pa.Table, requests: ShardRequests, where: str) -> None:
    """LedgerError unless `table`, in order, holds each asked pair exactly once: an anti-join both ways that names rows."""
    mine = [pa.array([pair[i] for pair in requests.pairs], KEY) for i in (0, 1)]
    order = _order(*mine)
    wanted_words = [word[order] for keys in mine for word in key_words(keys)]
    given_words = [word for name in ("query_key", "answer_key") for word in key_words(table[name])]
    strange = set(pc.unique(table["state"]).to_pylist()) - _STATES
    if not strange and all(np.array_equal(a, b) for a, b in zip(wanted_words, given_words, strict=True)):
        return
    texts = query_texts(requests.table) | query_texts(table)
    problem = pair_differences(
        requests.pairs, list(zip(table["query_key"].to_pylist(), table["answer_key"].to_pylist(), strict=True)), texts
    )
    problem = "; ".join(filter(None, [problem, *(f"unknown state {state}" for state in strange)]))
    fix = "nothing of this shard was published; run again, and report it if it happens again"
    value = f"{len(requests)} rows in, {table.num_rows} out"
    raise LedgerError(f"rows do not add up: {problem or 'they are out of order'}", where=where, value=value, fix=fix)


def query_texts(table: pa.Table) -> dict[bytes, str]:
    """The query of each query_key, to name rows by."""
    return dict(zip(table["query_key"].to_pylist(), table["query"].to_pylist(), strict=True))


def pair_differences(requests: Sequence[Pair], answers: Sequence[Pair], queries: dict[bytes, str]) -> str:
    """In words: which pairs are missing, not asked for or there twice, with a few of them named."""
    counts: dict[Pair, int] = {}
    for pair in answers:
        counts[pair] = counts.get(pair, 0) + 1
    known = set(requests)
    problems = {
        "missing": [pair for pair in requests if pair not in counts],
        "not asked for": [pair for pair in counts if pair not in known],
        "twice": [pair for pair, count in counts.items() if count > 1],
    }
    return "; ".join(
        f"{len(pairs)} {name} ({', '.join(_name_pair(pair, queries) for pair in pairs[:_LISTED])})"
        for name, pairs in problems.items()
        if pairs
    )


def _name_pair(pair: Pair, queries: dict[bytes, str]) -> str:
    return f"{queries.get(pair[0], 'query')!r} {pair[0].hex()[:12]}"
