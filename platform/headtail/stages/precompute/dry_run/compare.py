"""Which rows of a job an engine would be asked, and why: compared with everything in the store. Starts and changes nothing.

In: a job, sorted into shards, and earlier jobs of the catalog. Out: a Tally: rows and traffic per group (reused, resumed,
retried, changed and by which parts of the key, new), with examples, and a random sample of the rows to be asked. A shard is
opened by the same code that would run it, so the plan is what the job will do. Knows nothing of engines or money.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import open_storage, read_table
from headtail.batch.catalog import CatalogEntry, EarlierJob, catalog_entries
from headtail.batch.job import Job, ShardReceipt, read_receipt
from headtail.batch.prepare import InputManifest
from headtail.batch.shard import Shard
from headtail.batch.shard_requests import Pair, ShardRequests
from headtail.batch.worker import Ask
from headtail.core.errors import StorageError
from headtail.core.io_format import ModelFormat
from headtail.core.keys import answer_key
from headtail.core.rows import KEY, State, uniform_draw
from headtail.core.task import Task
from headtail.stages.precompute.dry_run.changes import key_changes

REUSED, RESUMED, RETRIED, CHANGED, NEW = "reused", "resumed", "retried", "changed", "new"
KINDS = (REUSED, RESUMED, RETRIED, CHANGED, NEW)
EXAMPLES = 3  # queries named per group, the most frequent ones
Group = tuple[str, tuple[str, ...]]  # a kind, and what about it
_KEYED = ["query_key", "answer_key", "state"]
_SEED = 0


def probes_of(path: str) -> str:
    """The folder under which the probes of the job at `path` are."""
    return f"{path}/probe/"


@dataclass(frozen=True)
class OlderJob:
    """An earlier job of the same task and source. `words`: the parts of the key, besides messages, that are others now."""

    entry: CatalogEntry
    words: tuple[str, ...]


@dataclass(frozen=True)
class Scope:
    """What a comparison is made between. `probed`: rows that probes of this very job answered; `keep`: rows of the sample."""

    job: Job
    manifest: InputManifest
    before: tuple[str, ...]
    older: tuple[OlderJob, ...]
    probed: frozenset[Pair]
    keep: int


@dataclass
class Tally:
    """Counts over some shards. `asked`: rows an engine would be asked, `probed` of them answered by probes of this job already."""

    rows: Counter[Group] = field(default_factory=Counter)
    traffic: Counter[Group] = field(default_factory=Counter)
    examples: dict[Group, list[tuple[int, str]]] = field(default_factory=dict)
    against: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    asked: int = 0
    unrendered: int = 0  # rows whose prompt cannot be made: they fail without being asked
    probed: int = 0
    open: int = 0  # shards in which rows are to be asked
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds and tokens of earlier runs of this job
    sample: pa.Table | None = None

    def add(self, other: Tally, keep: int) -> None:
        for name in ("rows", "traffic", "against"):
            getattr(self, name).update(getattr(other, name))
        for name, amount in other.spent.items():
            self.spent[name] += amount
        for name in ("duplicates", "asked", "unrendered", "probed", "open"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for group, found in other.examples.items():
            self.examples[group] = sorted([*self.examples.get(group, []), *found], reverse=True)[:EXAMPLES]
        pieces = [piece for piece in (self.sample, other.sample) if piece is not None]
        if pieces:
            self.sample = _lowest(pa.concat_tables(pieces), keep)


def _lowest(table: pa.Table, keep: int) -> pa.Table:
    """The `keep` rows of the lowest draw: a random sample that does not depend on the order in which rows are met."""
    order = pc.sort_indices(table, sort_keys=[("draw", "ascending"), ("answer_key", "ascending")])
    return table.take(order[:keep])


def scope(job: Job, manifest: InputManifest, keep: int) -> Scope:
    """The jobs that this one is compared with: whose answers it would reuse, and whose rows it would ask again."""
    store = open_storage(job.root)
    known = catalog_entries(store)
    mine = probes_of(job.path)
    probed: set[Pair] = set()
    for entry in known if job.reuse else ():
        if entry.path.startswith(mine):
            for table in EarlierJob(store, entry.path).answers(0, 1, _KEYED):
                kept = zip(*(table[name].to_pylist() for name in _KEYED), strict=True)
                probed |= {(query, key) for query, key, state in kept if state not in job.retry}
    others = [entry for entry in known if entry.path != job.path and not entry.path.startswith(mine)]
    before = [entry.path for entry in others if job.reuse and entry.settings == job.settings]
    same = [entry for entry in others if (entry.task, entry.source) == (job.task.name, job.source) and "/probe/" not in entry.path]
    older = tuple(OlderJob(entry, key_changes(entry, job)) for entry in same[: job.reuse_jobs])
    return Scope(job, manifest, tuple(before[: job.reuse_jobs]), older, frozenset(probed), keep)


class Comparison:
    """A Scope at work: earlier answers are opened once for any number of shards."""

    def __init__(self, scope: Scope) -> None:
        self.scope, self.job, self.store = scope, scope.job, open_storage(scope.job.root)
        self.before = [EarlierJob(self.store, path) for path in scope.before]
        self.rivals = [_Rival(older, EarlierJob(self.store, older.entry.path), self.job) for older in scope.older]

    def of(self, shards: Sequence[ShardReceipt | Ask]) -> Tally:
        """Published shards and shards to do, counted together."""
        tally = Tally()
        for shard in shards:
            tally.add(self._published(shard) if isinstance(shard, ShardReceipt) else self._open(shard), self.scope.keep)
        return tally

    def _published(self, receipt: ShardReceipt) -> Tally:
        counts = read_table(self.store, receipt.answers.path, ["count"])["count"]
        tally = Tally(duplicates=receipt.duplicates)
        tally.rows[RESUMED, ()] = receipt.rows
        tally.traffic[RESUMED, ()] = pc.sum(counts).as_py() or 0
        paid = {name: getattr(receipt, name) - getattr(receipt, f"reused_{name}") for name in ("tokens_in", "tokens_out")}
        tally.spent.update({"seconds": receipt.seconds, **paid})
        return tally

    def _open(self, ask: Ask) -> Tally:
        shard = Shard(self.job, self.store, self.scope.manifest, ask.shard, ask.edition, "plan", self.before)
        requests, todo, tally = shard.requests, set(shard.todo), Tally(duplicates=shard.requests.duplicates)
        groups: dict[int, Group] = {}
        for query, key in zip(shard.reused["query_key"].to_pylist(), shard.reused["answer_key"].to_pylist(), strict=True):
            groups[requests.place[query, key]] = (REUSED, ())
        failed = self._failed_here(shard, tally)
        if todo:
            self._group_requests(shard, todo, failed, groups, tally)
            askable = [row for row in shard.todo if row not in requests.unrendered]
            tally.asked, tally.unrendered = len(askable), len(todo) - len(askable)
            tally.open = int(tally.asked > 0)
            tally.probed = sum(requests.pairs[row] in self.scope.probed for row in askable)
            tally.sample = self._sample(shard.requests, askable)
        tally.spent["seconds"] += shard.journal.seconds
        counts, queries = pc.fill_null(requests.table["count"], 0).to_pylist(), requests.table["query"].to_pylist()
        found: dict[Group, list[tuple[int, str]]] = {}
        for row in range(len(requests)):
            found.setdefault(groups.get(row, (RESUMED, ())), []).append((counts[row], queries[row]))
        for group, rows in found.items():
            tally.rows[group], tally.traffic[group] = len(rows), sum(count for count, _ in rows)
            tally.examples[group] = sorted(rows, reverse=True)[:EXAMPLES]
        return tally

    def _sample(self, requests: ShardRequests, rows: list[int]) -> pa.Table | None:
        if not self.scope.keep:
            return None
        table = requests.table.take(pa.array(rows, pa.int64()))
        keys = pa.array([requests.pairs[row][1] for row in rows], KEY)
        table = table.append_column("answer_key", keys).append_column("draw", pa.array(uniform_draw(table["query_key"], "probe", _SEED)))
        return _lowest(table, self.scope.keep)

    def _group_requests(self, shard: Shard, todo: set[int], failed: set[Pair], groups: dict[int, Group], tally: Tally) -> None:
        """Put each row that is to be asked in its group: retried, changed or new."""
        groups |= {row: (RETRIED, ("failed in this job",)) for row in todo if shard.requests.pairs[row] in failed}
        left = todo - set(groups)
        for table in (table for source in self.before if left for table in self._answers(source, shard, _KEYED)):
            for pair, state in zip(_pairs(table), table["state"].to_pylist(), strict=True):
                row = shard.requests.place.get(pair, -1)
                if row in left:
                    groups[row] = (RETRIED, (state if state in self.job.retry else "without top_logprobs",))
                    left.discard(row)
        for rival in self.rivals:
            if not left:
                break
            found = rival.parts(shard, left, self._answers(rival.answers, shard, rival.columns))
            groups |= {row: (CHANGED, parts) for row, parts in found.items()}
            tally.against[rival.older.entry.path] += len(found)
            left -= set(found)
        groups |= dict.fromkeys(left, (NEW, ()))

    def _answers(self, source: EarlierJob, shard: Shard, columns: list[str]) -> Iterator[pa.Table]:
        return source.answers(shard.number, self.scope.manifest.shards, columns)

    def _failed_here(self, shard: Shard, tally: Tally) -> set[Pair]:
        """Rows that failed in an earlier run of this job; tokens of all its rows are counted as spent."""
        refs = list(shard.journal.segments)
        if shard.edition and not refs:
            refs = [read_receipt(self.job, self.store, shard.number, shard.edition - 1).answers]
        failed: set[Pair] = set()
        for ref in refs:
            try:
                table = read_table(self.store, ref.path, [*_KEYED, "tokens_in", "tokens_out"])
            except (StorageError, OSError, pa.ArrowInvalid):
                continue  # its rows are asked again, as the job itself would say
            for name in ("tokens_in", "tokens_out"):
                tally.spent[name] += pc.sum(table[name]).as_py() or 0
            failed |= set(_pairs(table.filter(pc.equal(table["state"], State.FAILED))))
        return failed


def _pairs(table: pa.Table) -> Iterator[Pair]:
    return zip(table["query_key"].to_pylist(), table["answer_key"].to_pylist(), strict=True)


class _Rival:
    """An earlier job whose rows ask the same queries under other keys: says which parts of the key differ, row by row."""

    def __init__(self, older: OlderJob, answers: EarlierJob, job: Job) -> None:
        self.older, self.answers, self.job = older, answers, job
        self.columns = ["query_key", "answer_key", *older.entry.side_inputs]

    @cached_property
    def _task(self) -> Task:
        file = self.job.task.file.model_copy(update={"side_inputs": self.older.entry.side_inputs})
        return dataclasses.replace(self.job.task, file=file, template=self.older.entry.template)

    @cached_property
    def _io_format(self) -> ModelFormat:
        return ModelFormat.model_validate(self.older.entry.parts.get("io_format", {}))

    def parts(self, shard: Shard, left: set[int], tables: Iterator[pa.Table]) -> dict[int, tuple[str, ...]]:
        """Of the rows in `left`, those whose query this job asked too, each with what is another now."""
        rows: dict[bytes, list[int]] = {}
        for row in left:
            rows.setdefault(shard.requests.pairs[row][0], []).append(row)
        keys = pa.array(list(rows), KEY)
        differing: dict[int, tuple[str, ...]] = {}
        for table in tables:
            for was in table.filter(pc.is_in(table["query_key"], value_set=keys)).to_pylist():
                for row in rows[was["query_key"]]:
                    if row not in differing or len(differing[row]) > 1:  # of several rows to one query, the one that differs least
                        parts = self._differ(shard, row, was)
                        differing[row] = min(differing.get(row, parts), parts, key=len)
        return differing

    def _differ(self, shard: Shard, row: int, was: Mapping[str, Any]) -> tuple[str, ...]:
        messages, words = shard.requests.messages[row], self.older.words
        if answer_key(messages, self.older.entry.settings) == was["answer_key"]:
            return words or ("reuse is off",)
        names, table = self.job.task.side_inputs, shard.requests.table
        query = table["query"][row].as_py()
        now = {name: table[name][row].as_py() or [] for name in names}
        then = {name: was.get(name) or [] for name in {*names, *self.older.entry.side_inputs}}
        found = [] if _render(self._task, self._io_format, query, {**then, **now}) == messages else ["prompt"]
        moved = [name for name in names if now[name] != then[name]]
        felt = [name for name in moved if _render(self.job.task, self.job.io_format, query, {**now, name: then[name]}) != messages]
        found += [f"side input {name}" for name in felt or (moved if not found else [])]
        return (*(found or ["prompt"]), *words)


def _render(task: Task, fmt: ModelFormat, query: str, side: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a row; a template that raises is as good as any other that does."""
    try:
        return fmt.messages(task, query, side)
    except Exception:  # the user's template, or an old one that does not fit
        return [{"role": "unrendered", "content": query}]
