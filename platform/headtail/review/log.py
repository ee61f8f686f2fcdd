"""What people decided, as an append-only log per task: `reviews/<task>/00000001.json`, `00000002.json`, ...

Answers to queries drawn for labels have a log of their own, `labelling/<task>/`, which no training set and no snapshot reads.
In: decisions. Out: numbered entries, each written completely before it is reported as recorded; the valid decision
for each query; all others as history. Of two people at the same time each gets a number of its own. A decision is taken
back by a further entry, never by deleting one. Knows nothing of the queue or of how decisions come in.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, read_json
from headtail.core.errors import StorageError
from headtail.core.keys import KEY_BYTES
from headtail.core.rows import REVIEWED
from headtail.review.decision import DROP, Decision, current_moment

FOLDER, LABELLING, PAGE, VERSION = "reviews", "labelling", "page", 1
LOGS = (f"{FOLDER}/", f"{LABELLING}/")

# REVIEWED, and where and how each decision was recorded. `withdrawn`: taken back later; `holds`: the one that counts for its query.
HISTORY = pa.schema(
    [*REVIEWED, ("number", pa.int64()), ("place", pa.int64()), ("source", pa.string()), ("withdrawn", pa.bool_()), ("holds", pa.bool_())]
)


class LoggedDecision(NamedTuple):
    """A recorded decision: entry `number`, the `place`-th within it (imports record many at once)."""

    number: int
    place: int
    source: str  # page, or import:<format>:<file name>:<digest>
    decision: Decision
    queue: str = ""  # table ref of the queue that it was made on; empty: not recorded


class DecisionLog:
    """The log of one task, in memory and on disk. Threads may share it; other processes may write beside it."""

    def __init__(self, store: Storage, task: str, folder: str = FOLDER) -> None:
        self.store, self.folder = store, f"{folder}/{task}"
        self.number = 0
        self._all: dict[tuple[int, int], LoggedDecision] = {}
        self._by_key: dict[bytes, list[LoggedDecision]] = {}
        self._current: dict[bytes, LoggedDecision] = {}
        self._withdrawn: set[tuple[int, int]] = set()
        self._lock = threading.RLock()
        for number, entry in append_log.read_entries(store, self.folder):
            self._take(number, entry)

    def refresh(self) -> set[bytes]:
        """Read what others wrote since; the keys of the queries concerned."""
        touched: set[bytes] = set()
        with self._lock:
            while self.store.exists(path := append_log.entry_path(self.folder, self.number + 1)):
                touched |= self._take(self.number + 1, read_json(self.store, path))
        return touched

    def record(self, decisions: Sequence[Decision], source: str, queue: str = "") -> int:
        """Write `decisions` as one entry; its number. When this returns they survive a kill of the process."""
        body = {"source": source, "queue": queue, "decisions": [_plain(decision) for decision in decisions]}
        return self._append(body)

    def undo(self, who: str) -> LoggedDecision | None:
        """Take back the last decision that `who` made on the page and that still stands; None when there is none."""
        with self._lock:
            self.refresh()
            mine = (k for k in reversed(self._all.values()) if k.decision.who == who and k.source == PAGE and not self.withdrawn(k))
            last = next(mine, None)
            if last is not None:
                self._append({"source": PAGE, "who": who, "at": current_moment(), "undoes": [last.number, last.place]})
        return last

    def current(self, key: bytes) -> LoggedDecision | None:
        """The decision that holds for a query: the latest by time, of equal times the one recorded last; None if none stands."""
        with self._lock:
            return self._current.get(key)

    def current_decisions(self) -> list[LoggedDecision]:
        """Every decision that holds, in order of query_key."""
        with self._lock:
            return [self._current[key] for key in sorted(self._current)]

    def on(self, key: bytes) -> list[LoggedDecision]:
        """Every decision on a query, as recorded, withdrawn ones too."""
        with self._lock:
            return list(self._by_key.get(key, ()))

    def all(self) -> list[LoggedDecision]:
        """Every decision, as recorded."""
        with self._lock:
            return list(self._all.values())

    def withdrawn(self, logged: LoggedDecision) -> bool:
        """Whether it was taken back."""
        return (logged.number, logged.place) in self._withdrawn

    def _append(self, body: dict[str, Any]) -> int:
        with self._lock:
            data = (json.dumps({"version": VERSION, **body}, ensure_ascii=False) + "\n").encode()
            number = self.number + 1
            while not self.store.create(append_log.entry_path(self.folder, number), data):  # someone else was first: the next is free
                number += 1
            self.refresh()
            return number

    def _take(self, number: int, entry: Any) -> set[bytes]:
        try:
            if entry["version"] != VERSION:
                raise ValueError(f"version {entry['version']}, this headtail knows {VERSION}")
            if "undoes" in entry:
                at, place = entry["undoes"]
                self._withdrawn.add((at, place))
                touched = {self._all[at, place].decision.query_key}
            else:
                source, queue = entry["source"], str(entry.get("queue", ""))
                found = [LoggedDecision(number, at, source, _decision(item), queue) for at, item in enumerate(entry["decisions"])]
                for logged in found:
                    self._all[logged.number, logged.place] = logged
                    self._by_key.setdefault(logged.decision.query_key, []).append(logged)
                touched = {kept.decision.query_key for kept in found}
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"not an entry of the review log: {type(error).__name__} {error}",
                where=self.store.uri(append_log.entry_path(self.folder, number)),
                fix="entries are never edited by hand; put the file back as it was written",
            ) from error
        for key in touched:
            standing = [kept for kept in self._by_key[key] if not self.withdrawn(kept)]
            if standing:
                self._current[key] = max(standing, key=lambda kept: (kept.decision.at, kept.number, kept.place))
            else:
                self._current.pop(key, None)
        self.number = number
        return touched


def decisions(store: Storage, task: str) -> pa.Table:
    """What holds now for the task of that name, as rows.REVIEWED: one row per query that someone decided on, by query_key.

    An answer was valid under the task's schema when it was decided; whether it is under today's is the reader's to check.
    `answer_key` names the answer that was shown: a drop is about that one.
    """
    return pa.Table.from_pylist([kept.decision._asdict() for kept in DecisionLog(store, task).current_decisions()], schema=REVIEWED)


def decision_history(store: Storage, task: str) -> pa.Table:
    """Every decision ever recorded, in order, as HISTORY."""
    log = DecisionLog(store, task)
    rows = [
        {
            **kept.decision._asdict(),
            "number": kept.number,
            "place": kept.place,
            "source": kept.source,
            "withdrawn": log.withdrawn(kept),
            "holds": log.current(kept.decision.query_key) == kept,
        }
        for kept in log.all()
    ]
    return pa.Table.from_pylist(rows, schema=HISTORY)


def digest(table: pa.Table) -> str:
    """Hex digest of what decisions say (who, when and why left out): the same digest, the same training rows."""
    names = ["query_key", "verdict", "answer", "answer_key"]
    made = hashlib.blake2b(digest_size=16)
    for row in zip(*(table[name].to_pylist() for name in names), strict=True):
        made.update(repr(row).encode("utf-8", "surrogatepass"))
    return made.hexdigest()


def erase_decisions(store: Storage, folder: str, keys: Collection[bytes]) -> int:
    """Take these queries out of a log: their decisions stay as empty places, so that all others keep theirs. How many."""
    erased = 0
    for number, entry in append_log.read_entries(store, folder):
        gone = [item for item in entry.get("decisions", ()) if bytes.fromhex(item["query_key"]) in keys]
        for item in gone:
            at = item["at"]
            item.update(_plain(Decision(bytes(KEY_BYTES), "", DROP, None, None, None, "", at, "")))
        if gone:
            store.replace(append_log.entry_path(folder, number), (json.dumps(entry, ensure_ascii=False) + "\n").encode())
            erased += len(gone)
    return erased


def identities(decisions: Iterable[Decision]) -> set[Decision]:
    """What was decided, with and without who and when: how an import knows what was recorded before."""
    return {decision_identity(decision, who=who, at=at) for decision in decisions for who in (True, False) for at in (True, False)}


def decision_identity(decision: Decision, who: bool, at: bool) -> Decision:
    """What makes two decisions the same: all of it, but for what the file did not say itself."""
    return decision._replace(who=decision.who if who else "", at=decision.at if at else "")


def _plain(decision: Decision) -> dict[str, Any]:
    key = decision.answer_key
    return {**decision._asdict(), "query_key": decision.query_key.hex(), "answer_key": key.hex() if key is not None else None}


def _decision(item: dict[str, Any]) -> Decision:
    key = item["answer_key"]
    for name, value in item.items():
        if not isinstance(value, str) and (value is not None or name not in ("answer", "before", "answer_key")):
            raise ValueError(f"{name} is not text")
    return Decision(
        **{**item, "query_key": bytes.fromhex(item["query_key"]), "answer_key": bytes.fromhex(key) if key is not None else None}
    )
