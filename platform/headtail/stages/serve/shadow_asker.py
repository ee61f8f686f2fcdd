"""The far end of shadow mode: asks the model about answers that were given, and writes how the two agree.

In: samples from the fronts' pipe. Out: `shadow/<day>/<time>-<process>.parquet`, rows of rows.SHADOW. It asks no more than the day's budget
pays for at the highest price that its requests can have. It reads the pipe only when it is free: what does not fit there is dropped by the
fronts and counted. A process of its own at a low priority; requests know nothing of it.

    python -m headtail.stages.serve.shadow_asker PLAN
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, open_storage, read_table
from headtail.adapters.storage.day_files import day_file
from headtail.batch.job import answer_settings
from headtail.batch.parsed_answer import classify
from headtail.core.errors import HeadtailError
from headtail.core.keys import answer_key, fingerprint
from headtail.core.redact import has_placeholder
from headtail.core.rows import SHADOW, State
from headtail.core.score import CODE_KINDS, ScoreConfig, f1, score_answer
from headtail.core.secrets import hide, hide_in_output
from headtail.core.task import Task
from headtail.engines import Completion, Engine, Request, open_engine
from headtail.engines.models import find_model
from headtail.releases import release as releases
from headtail.stages.serve.canary_judge import CanaryJudge
from headtail.stages.serve.children import end_with_parent
from headtail.stages.serve.deleted_rows import UndeletedRows
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.line_pipe import read_pipe
from headtail.stages.serve.run_folder import open_seen, read_plan
from headtail.stages.serve.shadow import ShadowConfig, ShadowSample

log = logging.getLogger("headtail.serve")
FOLDER = "shadow"
NICE = 10  # of 19: behind fronts and students
_READ = 65_536  # bytes at a time
_MOST_ROWS = 10_000  # of a file
_PAUSE_S = 30.0  # after the model could not be asked at all


class DayBudget:
    """What may still be spent today. `spent`: USD of a day so far, by its date."""

    def __init__(self, usd: float, spent: Callable[[datetime.date], float], today: Callable[[], datetime.date]) -> None:
        self._usd, self._before, self._today = usd, spent, today
        self._day, self._spent = datetime.date.min, 0.0

    def room(self, highest: float) -> float:
        """How many requests fit, if each costs `highest` USD; without a highest price: as many as one likes, until it is spent."""
        if (day := self._today()) != self._day:
            self._day, self._spent = day, self._before(day)
        left = self._usd - self._spent
        return max(0, math.floor(left / highest + 1e-9)) if highest else math.inf if left > 0 else 0

    def spend(self, usd: float) -> None:
        """So much was spent."""
        self._spent += usd


class ShadowAsker:
    """Asks one model. `spent`: see DayBudget; the default reads the store."""

    def __init__(
        self,
        store: Storage,
        config: ShadowConfig,
        counters: Counters | None = None,
        today: Callable[[], datetime.date] = lambda: datetime.datetime.now(datetime.UTC).date(),
    ) -> None:
        self._store, self._config, self._counters = store, config, counters
        self._model = find_model(config.model, store)
        self._tasks: dict[str, Task] = {}  # by release
        self._engine: tuple[str, Engine, str] | None = None  # fingerprint of its task, engine, settings of its answers
        self.budget = DayBudget(config.usd_per_day, lambda day: day_cost(store, day), today)

    def ask(self, samples: Sequence[ShadowSample]) -> list[dict[str, Any]]:
        """Rows of rows.SHADOW for those that the budget allows; the others are dropped and counted."""
        made: list[dict[str, Any]] = []
        for task, some in self._by_task(samples):
            fmt, tokens = self._model.io_format, int(task.file.sampling.max_tokens) * task.file.sampling.n
            room = self.budget.room(self._config.price(self._config.model.max_model_len, tokens))
            asked = some[: int(min(room, len(some)))]
            self._count("shadow_dropped", len(some) - len(asked))
            if not asked:
                continue
            engine, settings = self._open(task)
            messages = [fmt.messages(task, sample.query, sample.side_inputs) for sample in asked]
            clock = time.perf_counter()
            completions = {done.id: done for done in engine.generate(Request(at, one) for at, one in enumerate(messages))}
            seconds = (time.perf_counter() - clock) / len(asked)
            for at, sample in enumerate(asked):
                key = answer_key(messages[at], settings)
                made.append(self._row(task, sample, completions[at], key, seconds))
        return made

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine[1].close()

    def _by_task(self, samples: Iterable[ShadowSample]) -> list[tuple[Task, list[ShadowSample]]]:
        """Samples by the task of their release: while a canary runs there may be two."""
        found: dict[str, tuple[Task, list[ShadowSample]]] = {}
        for sample in samples:
            if sample.release not in self._tasks:
                self._tasks[sample.release] = releases.open_task(releases.load_release(self._store, sample.release))
            task = self._tasks[sample.release]
            if task.file.redacted == "uncached" and has_placeholder(sample.query):
                self._count("shadow_dropped")  # no model is asked about what was taken out
                continue
            found.setdefault(task.fingerprint, (task, []))[1].append(sample)
        return list(found.values())

    def _open(self, task: Task) -> tuple[Engine, str]:
        """The engine, held to this task's schema."""
        if self._engine is None or self._engine[0] != task.fingerprint:
            self.close()
            self._engine = None
            sampling, model = task.file.sampling.model_dump(), self._config.model
            engine = open_engine(model, self._model.path, self._model.io_format.bound(task, sampling["max_tokens"]), sampling)
            settings = fingerprint(answer_settings(task, model, self._model.digest, self._model.io_format))
            self._engine = task.fingerprint, engine, settings
        return self._engine[1], self._engine[2]

    def _row(self, task: Task, sample: ShadowSample, completion: Completion, key: bytes, seconds: float) -> dict[str, Any]:
        parsed = classify(task, completion, self._model.io_format)
        tokens_out = completion.tokens_out + sum(one.tokens_out for one in completion.samples)
        usd = self._config.price(completion.tokens_in, tokens_out, seconds)
        self.budget.spend(usd)
        self._count("shadow_asked")
        self._count("shadow_microusd", round(1e6 * usd))
        served, _ = task.parse(sample.answer)
        row = {
            **sample._asdict(),
            "answer": task.dump(served) if served is not None else sample.answer,
            "side_inputs": msgspec.json.encode(sample.side_inputs).decode(),
            "model": self._config.model.model,
            "state": str(parsed.state),
            "shadow": parsed.answer,
            "reason": parsed.reason,
            "answer_key": key.hex(),
            "tokens_in": completion.tokens_in,
            "tokens_out": tokens_out,
            "usd": usd,
            "score": None,
            "agree": None,
        }
        if parsed.state == State.ANSWERED and parsed.answer is not None:
            score = ScoreConfig(kind="exact") if task.file.score.kind in CODE_KINDS else task.file.score
            counts = score_answer(score, task.parse(parsed.answer)[0], served, query=sample.query)
            row |= {"score": f1([counts]), "agree": counts.right}
            self._count(f"shadow/{sample.source}/compared")
            self._count(f"shadow/{sample.source}/agreed", int(counts.right))
        return row

    def _count(self, name: str, by: int = 1) -> None:
        if self._counters is not None and by:
            self._counters.add(name, by)


def day_cost(store: Storage, day: datetime.date) -> float:
    """USD that the store's rows of a day cost."""
    files = [one.path for one in store.files(f"{FOLDER}/{day:%Y-%m-%d}") if one.path.endswith(".parquet")]
    return sum(float(pc.sum(read_table(store, path, ["usd"])["usd"]).as_py() or 0.0) for path in files)


class ShadowTable:
    """Rows that are not written yet, and the files they go to. `judge`: what else takes in the rows of each file."""

    def __init__(self, store: Storage, seconds: float, judge: CanaryJudge | None = None) -> None:
        self._judge = judge
        self._undeleted, self._seconds, self._rows, self._since, self._files = UndeletedRows(store), seconds, list[dict[str, Any]](), 0.0, 0

    @property
    def wait_s(self) -> float | None:
        """Seconds until a file is due; None while there is nothing to write."""
        return max(0.0, self._since + self._seconds - time.monotonic()) if self._rows else None

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows; write a file when one is due."""
        if rows and not self._rows:
            self._since = time.monotonic()
        self._rows += rows
        if len(self._rows) >= _MOST_ROWS or self.wait_s == 0.0:
            self.flush()

    def flush(self) -> None:
        """Write what is there, but for queries that were deleted. A store that is away loses it, with a line that says so."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        self._files += 1
        try:
            path = day_file(FOLDER, self._files)
            self._undeleted.write(path, rows, lambda row: str(row["query"]), lambda left: pa.Table.from_pylist(left, schema=SHADOW))
            if self._judge is not None:
                self._judge.add(rows)
        except HeadtailError as error:
            log.warning("%d rows of %s were dropped: %s", len(rows), FOLDER, hide(str(error))[:300])

    def close(self) -> None:
        """Write the last rows."""
        self.flush()
        if self._judge is not None:
            self._judge.close()


class _Stop(BaseException):
    """SIGTERM came: what is being asked is given up."""


def follow_pipe(pipe: int, asker: ShadowAsker, table: ShadowTable, counters: Counters | None = None) -> None:
    """Read, ask and write until the last writer has closed the pipe."""
    decode = msgspec.json.Decoder(list[Any]).decode
    part = b""
    for data in read_pipe(pipe, lambda: table.wait_s, _READ):
        if not data:
            table.flush()
            continue
        *lines, part = (part + data).split(b"\n")
        samples = [ShadowSample(*decode(line)) for line in lines]
        try:
            table.add(asker.ask(samples))
        except Exception as error:  # the model is away, a release is gone: the next samples may fare better
            if counters is not None:
                counters.add("shadow_dropped", len(samples))
            log.warning("the model could not be asked: %s: %s", type(error).__name__, hide(str(error))[:300])
            time.sleep(_PAUSE_S)


def main() -> None:
    """Command line: PLAN."""
    hide_in_output()
    path = Path(sys.argv[1])
    plan = read_plan(path)
    end_with_parent(plan.parent)
    config, pipe = plan.config, plan.shadow_pipe
    assert pipe is not None

    def stop(*_: object) -> None:
        raise _Stop

    signal.signal(signal.SIGTERM, stop)
    logging.basicConfig(level=logging.WARNING, format="shadow: %(message)s")
    os.nice(NICE)
    try:
        store, counters = open_storage(config.root), Counters(path.parent / "counters", config.fronts + 2)  # the row after the pages'
        judge = (
            CanaryJudge(store, config.shadow, seen=lambda salt: open_seen(path.parent, salt, "-judged")) if config.count_canary else None
        )
        table = ShadowTable(store, config.log_rotate_s, judge)
        try:
            follow_pipe(pipe, ShadowAsker(store, config.shadow, counters), table, counters)
        except _Stop:
            pass
        finally:
            table.close()
    except HeadtailError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    os._exit(0)  # whatever an engine's threads still wait for


if __name__ == "__main__":
    main()
