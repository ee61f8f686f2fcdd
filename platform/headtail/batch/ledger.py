"""Do the rows add up: the last check of a job before anything reads its answers.

In: the manifest and a ShardReceipt per shard. Out: a Ledger, or a LedgerError that names shards and rows. Workers have
compared every row with their shard's input before they published it; here each shard is there once, the sums agree, and
what is in the store now is read again and compared with the input both ways: no query missing, and none that is not in the input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, read_table
from headtail.batch.job import Job, ShardReceipt
from headtail.batch.prepare import InputManifest, read_shard
from headtail.core.errors import LedgerError, StorageError
from headtail.core.rows import State

_LISTED = 5
_LOOKUP_THREADS = 16


@dataclass(frozen=True)
class Ledger:
    """A job whose rows add up. `computed`: rows an engine was run for now; `reused`: rows that another job had answered before.

    `seconds` and tokens of reused rows are apart: they were paid for by that job. `tokens_in` and `tokens_out` hold both.
    """

    shards: tuple[ShardReceipt, ...]
    rows: int
    duplicates: int
    states: dict[str, int]
    reasons: dict[str, int]
    computed: int
    reused: int
    tokens_in: int
    tokens_out: int
    seconds: float
    reused_seconds: float
    reused_tokens_in: int
    reused_tokens_out: int
    start_s: float
    restarts: int
    missing_side_inputs: dict[str, tuple[str, ...]]
    given_up: int = 0  # failed rows, and rows in a state of `retry`, that were asked in as many runs as a row may be
    engine: dict[str, Any] = field(default_factory=dict)  # of the worker that answered most: arguments in force, how full it was

    @property
    def new_tokens(self) -> tuple[int, int]:
        """Prompt and answer tokens that this job paid for."""
        return self.tokens_in - self.reused_tokens_in, self.tokens_out - self.reused_tokens_out

    def plain(self) -> dict[str, Any]:
        """For people and the tracking server."""
        return {
            "rows": self.rows,
            "duplicates": self.duplicates,
            "states": self.states,
            "reasons": self.reasons,
            "computed": self.computed,
            "reused": self.reused,
            "resumed": self.rows - self.computed - self.reused,
            "shards": [shard.model_dump(mode="json") for shard in self.shards],
        }


def close_ledger(
    job: Job,
    store: Storage,
    manifest: InputManifest,
    done: Sequence[ShardReceipt],
    new: Sequence[ShardReceipt],
    reports: Sequence[dict[str, Any]],
) -> Ledger:
    """The Ledger of shards found `done` and shards done now (`new`). `reports`: what each Ray task reported of its engine."""
    shards = tuple(sorted([*done, *new], key=lambda receipt: receipt.shard))
    check_sums(shards, manifest, job.path)
    audit(shards, manifest, store, job.path)
    states: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for shard in shards:
        states.update(shard.states)
        reasons.update(shard.reasons)
    starts = {one["worker"]: one["start_s"] for one in reports}
    restarts = {one["worker"]: one["restarts"] for one in reports}
    return Ledger(
        shards=shards,
        rows=sum(shard.rows for shard in shards),
        duplicates=sum(shard.duplicates for shard in shards),
        states={str(state): states.get(state, 0) for state in State},
        reasons=dict(reasons.most_common(_LISTED)),
        computed=sum(shard.computed for shard in new),
        reused=sum(shard.reused for shard in shards),
        tokens_in=sum(shard.tokens_in for shard in shards),
        tokens_out=sum(shard.tokens_out for shard in shards),
        seconds=sum(shard.seconds for shard in shards),
        reused_seconds=sum(shard.reused_seconds for shard in shards),
        reused_tokens_in=sum(shard.reused_tokens_in for shard in shards),
        reused_tokens_out=sum(shard.reused_tokens_out for shard in shards),
        start_s=max(starts.values(), default=0.0),
        restarts=sum(restarts.values()),
        missing_side_inputs=manifest.missing_side_inputs,
        given_up=sum(shard.failed - shard.retryable(job.max_runs_per_row) + shard.given_up for shard in shards),
        engine=max((one["engine"] for one in reports), key=lambda facts: facts.get("engine_rows", 0), default={}),
    )


def check_sums(shards: Sequence[ShardReceipt], manifest: InputManifest, where: str) -> None:
    """LedgerError unless each shard of the manifest is there once and input rows = rows by state + duplicates, per shard and in all."""
    wanted = Counter({shard: 0 for part in manifest.parts for shard in part.shards})
    given = Counter(receipt.shard for receipt in shards)
    problems = [f"shard {number} is missing" for number in wanted if number not in given]
    problems += [f"shard {number} is there {count} times" for number, count in given.items() if count > 1]
    problems += [f"shard {number} was not asked for" for number in given if number not in wanted]
    for receipt in shards:
        total = sum(receipt.states.values())
        if not receipt.rows == total == receipt.answers.rows:
            problems.append(f"shard {receipt.shard}: {receipt.rows} rows in, {total} by state, {receipt.answers.rows} written")
    out = sum(receipt.rows + receipt.duplicates for receipt in shards)
    if out != manifest.rows:
        problems.append(f"{manifest.rows} rows in, {out} accounted for")
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        fix = "nothing was published as this stage's output; run again, and report it if it happens again"
        raise LedgerError(f"rows do not add up: {'; '.join(problems[:_LISTED])}{more}", where=where, fix=fix)


def audit(shards: Sequence[ShardReceipt], manifest: InputManifest, store: Storage, where: str) -> None:
    """LedgerError unless the answers in the store are to exactly the queries of the input, by an anti-join both ways per shard."""

    def problem(receipt: ShardReceipt) -> str:
        try:
            size = store.size(receipt.answers.path)
            if size != receipt.answers.bytes:
                return f"shard {receipt.shard}: {receipt.answers.path} has {size} bytes, not {receipt.answers.bytes}"
            answers = read_table(store, receipt.answers.path, ["query_key", "query"])
        except (StorageError, OSError) as error:
            return f"shard {receipt.shard}: {receipt.answers.path}: {error}"
        if answers.num_rows != receipt.rows:
            return f"shard {receipt.shard}: {receipt.answers.path} has {answers.num_rows} rows, not {receipt.rows}"
        asked = read_shard(store, manifest, receipt.shard, ["query_key", "query"])
        both = (("missing", _only_in(asked, answers)), ("not asked for", _only_in(answers, asked)))
        problems = [f"{len(rows)} {name} ({', '.join(map(repr, rows[:_LISTED]))})" for name, rows in both if rows]
        return f"shard {receipt.shard}: {'; '.join(problems)}" if problems else ""

    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        problems = [text for text in pool.map(problem, shards) if text]
    if problems:
        fix = "these files were changed after they were written: remove the job's folder and run again"
        raise LedgerError(f"published answers do not match the input: {'; '.join(problems[:_LISTED])}", where=where, fix=fix)


def _only_in(one: pa.Table, other: pa.Table) -> list[str]:
    """Queries of `one` whose key is not in `other`."""
    there = pc.is_in(one["query_key"], value_set=other["query_key"].combine_chunks())
    return [] if pc.all(there).as_py() in (True, None) else one.filter(pc.invert(there))["query"].to_pylist()
