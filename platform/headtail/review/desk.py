"""The desk: the queue and the log together, one request at a time.

In: where a person is in the queue, what they decide. Out: plain values for the page. A decision is in the store before
`decide` returns. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import numpy as np

from headtail import __version__
from headtail.adapters.storage import Storage
from headtail.core.task import Task
from headtail.review.decision import CORRECT, Decision, canonical_answer, current_moment, read_person, resolve_verdict
from headtail.review.labelstudio import label_choices
from headtail.review.log import FOLDER, LABELLING, PAGE, DecisionLog, LoggedDecision
from headtail.review.queue import Item, Queue

SHOWS = ("open", "decided", "all")
_BEFORE, _AFTER = 3, 9  # rows of the queue shown beside the one that is looked at


class DeskRefusal(Exception):
    """What a person asked for cannot be done, in words for them."""


class Desk:
    """Threads may share it: one per request."""

    def __init__(self, store: Storage, task: Task, queue: Queue, who: str, labelling: bool = False) -> None:
        """`labelling`: queries that were drawn for labels. Nobody sees an answer, and decisions go to a log of their own."""
        self.task, self.queue, self.who, self.labelling = task, queue, who, labelling
        self.log = DecisionLog(store, task.name, LABELLING if labelling else FOLDER)
        self._lock = threading.Lock()
        self._decided = np.zeros(len(queue), bool)
        self._version = 0  # raised with every change of what is decided
        self._progress: tuple[int, dict[str, Any]] = (-1, {})
        self._mark({kept.decision.query_key for kept in self.log.current_decisions()})

    def page_facts(self) -> dict[str, Any]:
        """What does not change while the page is open."""
        file = self.task.file
        return {
            "task": self.task.name,
            "description": file.description,
            "score": file.score.model_dump(mode="json"),
            "labels": label_choices(self.task),
            "queue": self.queue.ref,
            "labelling": self.labelling,
            "fields": list(self.task.schema.get("properties") or ()),
            "rows": len(self.queue),
            "who": self.who,
            "headtail": __version__,
        }

    def row(self, start: int, step: int, show: str) -> dict[str, Any]:
        """The row at `start` (from 0) when `step` is 0, else the next one after it in that direction among those shown.

        `rank` is null when there is none: the end of the queue.
        """
        self.refresh()
        with self._lock:
            mask = self._mask(show)
            place = start if not step else self._next(mask, start, step)
            near = [] if place is None else self._near(mask, place)
        if place is None or not 0 <= place < len(self.queue):
            return {"rank": None, "progress": self.progress()}
        return {**self._row_json(self.queue.item(place)), "near": near, "progress": self.progress()}

    def progress(self) -> dict[str, Any]:
        """How far the queue is."""
        with self._lock:
            version, done = self._version, self._decided.copy()
        if self._progress[0] == version:
            return self._progress[1]
        gain = self.queue.gain
        holding = [kept.decision for kept in self.log.current_decisions() if kept.decision.query_key in self.queue.places]
        found = {
            "rows": len(self.queue),
            "decided": int(done.sum()),
            "gain": float(gain[done].sum() / gain.sum()) if gain.sum() > 0 else None,
            "verdicts": dict(Counter(decision.verdict for decision in holding)),
            "people": dict(Counter(decision.who for decision in holding).most_common(12)),
        }
        self._progress = version, found
        return found

    def check(self, text: str) -> dict[str, str]:
        """Whether an answer may be given, before it is."""
        return {"problem": canonical_answer(self.task, text)[1]}

    def decide(self, rank: int, query_key: str, verdict: str, answer: str, who: str, why: str, seen: int) -> dict[str, Any]:
        """Record a decision on the row of that rank. `seen`: number of the decision the person saw on it, 0 for none."""
        if not 1 <= rank <= len(self.queue) or (item := self.queue.item(rank - 1)).query_key != query_key:
            raise DeskRefusal("this is not the queue that the page was opened with: reload the page")
        who, why, problem = read_person(who, why)
        holds, wrong = resolve_verdict(self.task, verdict, answer or None, item.answer)
        if wrong or problem:
            raise DeskRefusal(wrong or problem)
        key = bytes.fromhex(item.query_key)
        self.refresh()
        before = self.log.current(key)
        at = max(
            current_moment(), before.decision.at if before else ""
        )  # clocks of two machines differ; who decides last has seen the other
        answer_key = bytes.fromhex(item.answer_key) if item.answer_key else None
        number = self.log.record([Decision(key, item.query, verdict, holds, item.answer, answer_key, who, at, why)], PAGE, self.queue.ref)
        self._mark({key})
        others = [kept for kept in self.log.on(key) if seen < kept.number != number and not self.log.withdrawn(kept)]
        return {"number": number, "others": [self._decision_json(kept) for kept in others], "progress": self.progress()}

    def undo(self, who: str) -> dict[str, Any]:
        """Take back the last decision of `who`; its rank, null when it is not of this queue."""
        undone = self.log.undo(who.strip())
        if undone is None:
            raise DeskRefusal(f"nothing to take back: {who.strip() or 'nobody'} has decided nothing on this page that still stands")
        key = undone.decision.query_key
        self._mark({key})
        places = self.queue.places.get(key, [])
        return {"rank": places[0] + 1 if places else None, "undone": self._decision_json(undone), "progress": self.progress()}

    def refresh(self) -> None:
        """Take in what others decided, in this process or another."""
        self._mark(self.log.refresh())

    def _mark(self, keys: set[bytes]) -> None:
        with self._lock:
            self._version += bool(keys)
            for key in keys:
                self._decided[self.queue.places.get(key, [])] = self.log.current(key) is not None

    def _mask(self, show: str) -> Any:
        if show not in SHOWS:
            raise DeskRefusal(f"show: one of {', '.join(SHOWS)}")
        return np.ones(len(self.queue), bool) if show == "all" else self._decided if show == "decided" else ~self._decided

    def _next(self, mask: Any, start: int, step: int) -> int | None:
        found = np.flatnonzero(mask[start + 1 :]) + start + 1 if step > 0 else np.flatnonzero(mask[: max(start, 0)])
        return None if not len(found) else int(found[0 if step > 0 else -1])

    def _near(self, mask: Any, place: int) -> list[dict[str, Any]]:
        before = np.flatnonzero(mask[:place])[-_BEFORE:].tolist()
        after = (np.flatnonzero(mask[place + 1 :])[: _BEFORE + _AFTER - len(before)] + place + 1).tolist()
        shown = []
        for item in self.queue.items([*before, place, *after]):
            kept = self.log.current(bytes.fromhex(item.query_key))
            shown.append({"rank": item.rank, "query": item.query, "verdict": kept.decision.verdict if kept else ""})
        return shown

    def _row_json(self, item: Item) -> dict[str, Any]:
        key = bytes.fromhex(item.query_key)
        current, alternatives = self.log.current(key), dict.fromkeys(a for a in item.alternatives if a != item.answer)
        return {
            **{name: getattr(item, name) for name in ("rank", "query_key", "query", "stratum", "count", "score", "gain", "reasons")},
            **{name: getattr(item, name) for name in ("confidence", "agreement", "side")},
            "answer": self._answer(item.answer) if item.answer is not None else None,
            "alternatives": [self._answer(text) for text in alternatives],
            "decision": self._decision_json(current) if current else None,
            "about_another": bool(current and (current.decision.answer_key or b"").hex() != (item.answer_key or "")),
            "history": [self._decision_json(kept) for kept in self.log.on(key)],
            "seen": max((kept.number for kept in self.log.on(key)), default=0),
        }

    def _answer(self, text: str) -> dict[str, str]:
        """An answer with its fields in the schema's order, as compact JSON, and why it could not be taken, if so."""
        answer, problem = self.task.parse(text)
        ordered = text if problem else json.dumps(json.loads(self.task.target(answer)), ensure_ascii=False, separators=(",", ":"))
        return {"text": ordered, "problem": problem}

    def _decision_json(self, logged: LoggedDecision) -> dict[str, Any]:
        decision = logged.decision
        answer = self._answer(decision.answer)["text"] if decision.verdict == CORRECT and decision.answer is not None else None
        said = {name: getattr(decision, name) for name in ("verdict", "who", "at", "why")}
        return {**said, "answer": answer, "number": logged.number, "source": logged.source, "withdrawn": self.log.withdrawn(logged)}
