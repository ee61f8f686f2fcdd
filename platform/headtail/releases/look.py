"""Looks at human labels: which labelled rows were ever compared with whose answers, so that looking is spending.

In: SCORED rows. Out: `looks/<n>.json`, an append-only log, and the number of a look: how many different ones there were before it on rows
that it shares. A look is known by its rows, the answers on them and the policy in force; task, answer source and stage are for people, so
renaming them changes nothing, and reading the same again is no new look. A gate's look keeps the policy, and binds later ones on its rows:
none may ask for less. Knows nothing of levels or tests.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, open_storage, write_once
from headtail.core.config import Config
from headtail.core.errors import GateRejected
from headtail.core.keys import KEY_BYTES
from headtail.core.paths import StoreId
from headtail.core.policy import TaskPolicy
from headtail.core.task import Task

LOOKS = "looks"
LEDGER = "HEADTAIL_LEDGER"  # environment: where looks and seals of several stores are kept together
GATE = "gate"  # the stage whose looks bind the policy


def ledger_of(store: Storage) -> Storage:
    """Where looks and seals are kept: in the store, or at the place outside of it that the environment names. Then the same labels in a
    fresh root are not fresh."""
    outside = _outside_ledger()
    return store if outside is None else outside


def ledger_digest() -> str:
    """SHA-256 of the address of a ledger outside of the store; empty: it is in the store."""
    outside = _outside_ledger()
    return "" if outside is None else hashlib.sha256(outside.root.encode()).hexdigest()


def _outside_ledger() -> Storage | None:
    place = os.environ.get(LEDGER, "").strip()
    return open_storage(place) if place else None


class Look(Config):
    """One answer source's answers, compared with people's on some rows."""

    rows: StoreId = Field(description="digest of the labelled queries' keys; looks/rows/<digest> holds them")
    answers: StoreId = Field(description="digest of the rows: keys, people's answers, the given answers")
    policy: str = Field(description="digest of the task's gate policy then")
    judge: str = Field("", description="SHA-256 of a judge's table; empty: none")
    terms: TaskPolicy | None = Field(None, description="of a gate: the policy itself; null: none, or of an earlier version")
    scoring: str = Field("", description="of a gate: digest of how the task compares two answers, with its fallback")
    stage: str = Field(description="who looked; for people, as the fields below")
    task: str = Field("", description="name of the task")
    source: str = Field("", description="answer source")
    at: str = Field(description="UTC, ISO 8601")

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What makes it the same look."""
        return self.rows, self.answers, self.policy, self.judge


def record_look(store: Storage, stage: str, task: str, policy: str, sources: Mapping[str, pa.Table]) -> dict[str, int]:
    """Write down, before anybody sees a figure, that these SCORED rows (by answer source) are compared; returns each look's number.

    A look's number counts, from 1, the different looks that were ever begun in this store on rows that it shares. A look that was
    written down before keeps its number.
    """
    mine = {source: _look(store, rows, stage=stage, task=task, policy=policy, source=source) for source, rows in sources.items()}
    every = read_look_log(store)
    known = {look.identity for look in every}
    return _record(store, every, mine, [look for look in mine.values() if look.identity not in known])


def record_gate(store: Storage, task: Task, source: str, rows: pa.Table, judge: str = "") -> int:
    """`record_look` of a gate, on the rows of one answer source. `judge`: SHA-256 of a judge's table; empty: none.

    GateRejected, and nothing is written, when a gate saw some of these rows before under a policy that asked for more.
    """
    terms = {"terms": task.file.gate, "scoring": task.scoring_digest}
    mine = _look(store, rows, stage=GATE, task=task.name, policy=task.policy_digest, source=source, judge=judge, **terms)
    every, own, fresh = read_look_log(store), load_keys(store, mine.rows), True
    for look in (one for one in every if one.stage == GATE):
        if look.identity == mine.identity:
            fresh = False
            break
        if look.policy != mine.policy and not own.isdisjoint(load_keys(store, look.rows)):
            _refuse_looser(task, look)
    return _record(store, every, {source: mine}, [mine] if fresh else [])[source]


def _refuse_looser(task: Task, earlier: Look) -> None:
    """GateRejected when the policy asks for less than that of an earlier gate, or nobody can tell."""
    if earlier.terms is None:
        looser = ["its digest alone is known"]
    elif earlier.scoring != task.scoring_digest:
        looser = ["score of the task, or fallback"]
    else:
        looser = task.file.gate.looser_than(earlier.terms)
    if looser:
        what = f"a gate saw some of these labelled rows on {earlier.at} under a stricter policy: {', '.join(looser)}"
        fix = "put the policy back (a stricter one is fine), or draw and seal fresh human labels: a policy is written before its results"
        raise GateRejected(what, where=f"task {task.name}: gate", value=f"{task.policy_digest[:8]}, then {earlier.policy[:8]}", fix=fix)


def _look(store: Storage, rows: pa.Table, **fields: Any) -> Look:
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    keys, answers = keep_keys(store, rows["query_key"].to_pylist()), answers_digest(rows, ["query_key", "wanted", "given"])[:32]
    return Look(rows=keys, answers=answers, at=at, **fields)


def _record(store: Storage, every: list[Look], mine: Mapping[str, Look], new: Iterable[Look]) -> dict[str, int]:
    """Append `new`; the numbers of `mine`. `every`: the log as it was read."""
    written = False
    for look in new:
        data, written = (look.model_dump_json() + "\n").encode(), True
        append_log.append_entry(ledger_of(store), LOOKS, lambda _, data=data: data)  # type: ignore[misc]
    every = read_look_log(store) if written else every  # anew: two who look at the same time see one order
    return {source: _number(store, every, look) for source, look in mine.items()}


def read_look_log(store: Storage) -> list[Look]:
    """All looks, oldest first."""
    return list(append_log.read_entry_records(ledger_of(store), Look, LOOKS))


def seen_keys(store: Storage, looks: Iterable[Look] | None = None) -> set[bytes]:
    """The keys of all labelled queries that anybody looked at."""
    digests = {look.rows for look in (read_look_log(store) if looks is None else looks)}
    return set().union(*(load_keys(store, digest) for digest in digests)) if digests else set()


def keep_keys(store: Storage, keys: Sequence[bytes]) -> str:
    """Keep a set of keys once, under its digest, which is returned."""
    data = b"".join(sorted(set(keys)))
    digest = hashlib.sha256(data).hexdigest()[:32]
    write_once(ledger_of(store), _keys_path(digest), data)
    return digest


def load_keys(store: Storage, digest: str) -> set[bytes]:
    """The keys that a digest stands for."""
    data = ledger_of(store).read(_keys_path(digest))
    return {data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)}


def answers_digest(rows: pa.Table, columns: Sequence[str]) -> str:
    """SHA-256 over these columns of SCORED rows, whatever the order of the rows; `query_key` must be one of them."""
    order = pc.sort_indices(rows, sort_keys=[(name, "ascending") for name in columns if name in ("source", "query_key")])
    lines = [
        [row[name].hex() if name == "query_key" else row[name] for name in columns] for row in rows.select(columns).take(order).to_pylist()
    ]
    return hashlib.sha256(json.dumps(lines, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _keys_path(digest: str) -> str:
    return f"{LOOKS}/rows/{digest}"


def _number(store: Storage, every: Sequence[Look], mine: Look) -> int:
    own, sets, earlier = load_keys(store, mine.rows), {mine.rows: True}, set()
    for look in every:
        if look.identity == mine.identity:
            break
        if look.rows not in sets:
            sets[look.rows] = not own.isdisjoint(load_keys(store, look.rows))
        if sets[look.rows]:
            earlier.add(look.identity)
    return len(earlier) + 1
