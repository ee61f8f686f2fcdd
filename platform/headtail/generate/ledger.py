"""Do the rows add up: the last look at a job before anything reads its answers.

In: the manifest and a ShardReceipt per shard. Out: a Ledger, or a LedgerError that names shards. Workers have compared
every row with their shard's input; here each shard is there once, its file is whole, and the sums agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from headtail.errors import LedgerError, StorageError
from headtail.generate.job import Job, ShardReceipt
from headtail.generate.prepare import Manifest
from headtail.rows import State
from headtail.storage import Storage

_LISTED = 5
_LOOKS = 16


@dataclass(frozen=True)
class Ledger:
    """A job whose rows add up. `computed`: rows an engine was run for now; the others were found finished."""

    shards: tuple[ShardReceipt, ...]
    rows: int
    duplicates: int
    states: dict[str, int]
    reasons: dict[str, int]
    computed: int
    tokens_in: int
    tokens_out: int
    seconds: float
    start_s: float
    restarts: int
    lacking: dict[str, tuple[str, ...]]
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def failed_share(self) -> float:
        return self.states[State.FAILED] / self.rows if self.rows else 0.0

    def plain(self) -> dict[str, Any]:
        """For people and the tracking server."""
        return {
            "rows": self.rows,
            "duplicates": self.duplicates,
            "states": self.states,
            "reasons": self.reasons,
            "computed": self.computed,
            "resumed": self.rows - self.computed,
            "shards": [shard.model_dump(mode="json") for shard in self.shards],
        }


def settle_up(
    job: Job, store: Storage, manifest: Manifest, done: Sequence[ShardReceipt], made: Sequence[ShardReceipt], said: Sequence[dict[str, Any]]
) -> Ledger:
    """The Ledger of shards found `done` and shards `made` now. `said`: what each Ray task told of its engine."""
    shards = tuple(sorted([*done, *made], key=lambda receipt: receipt.shard))
    check_sums(shards, manifest, job.path)
    _check_files(shards, store, job.path)
    states: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for shard in shards:
        states.update(shard.states)
        reasons.update(shard.reasons)
    starts = {one["worker"]: one["start_s"] for one in said}
    restarts = {one["worker"]: one["restarts"] for one in said}
    return Ledger(
        shards=shards,
        rows=sum(shard.rows for shard in shards),
        duplicates=sum(shard.duplicates for shard in shards),
        states={str(state): states.get(state, 0) for state in State},
        reasons=dict(reasons.most_common(_LISTED)),
        computed=sum(shard.computed for shard in made),
        tokens_in=sum(shard.tokens_in for shard in shards),
        tokens_out=sum(shard.tokens_out for shard in shards),
        seconds=sum(shard.seconds for shard in shards),
        start_s=max(starts.values(), default=0.0),
        restarts=sum(restarts.values()),
        lacking=manifest.lacking,
        engine=next((one["engine"] for one in said if one["engine"]), {}),
    )


def check_sums(shards: Sequence[ShardReceipt], manifest: Manifest, where: str) -> None:
    """LedgerError unless each shard of the manifest is there once and input rows = rows by state + duplicates, per shard and in all."""
    wanted = Counter({shard: 0 for part in manifest.parts for shard in part.shards})
    given = Counter(receipt.shard for receipt in shards)
    said = [f"shard {number} is missing" for number in wanted if number not in given]
    said += [f"shard {number} is there {count} times" for number, count in given.items() if count > 1]
    said += [f"shard {number} was not asked for" for number in given if number not in wanted]
    for receipt in shards:
        total = sum(receipt.states.values())
        if not receipt.rows == total == receipt.answers.rows:
            said.append(f"shard {receipt.shard}: {receipt.rows} rows in, {total} by state, {receipt.answers.rows} written")
    out = sum(receipt.rows + receipt.duplicates for receipt in shards)
    if out != manifest.rows:
        said.append(f"{manifest.rows} rows in, {out} accounted for")
    if said:
        more = f" and {len(said) - _LISTED} more" if len(said) > _LISTED else ""
        fix = "nothing was published as this stage's output; run again, and report this if it stays"
        raise LedgerError(f"rows do not add up: {'; '.join(said[:_LISTED])}{more}", where=where, fix=fix)


def _check_files(shards: Sequence[ShardReceipt], store: Storage, where: str) -> None:
    def problem(receipt: ShardReceipt) -> str:
        try:
            size = store.size(receipt.answers.path)
        except (StorageError, OSError) as error:
            return f"shard {receipt.shard}: {receipt.answers.path}: {error}"
        wanted = receipt.answers.bytes
        return "" if size == wanted else f"shard {receipt.shard}: {receipt.answers.path} has {size} bytes, not {wanted}"

    with ThreadPoolExecutor(_LOOKS) as pool:
        said = [text for text in pool.map(problem, shards) if text]
    if said:
        fix = "these files were changed after they were written: remove the job's folder and run again"
        raise LedgerError(f"answers that were published are not there: {'; '.join(said[:_LISTED])}", where=where, fix=fix)
