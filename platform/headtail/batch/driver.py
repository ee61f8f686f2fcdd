"""Generate: an engine over any number of rows, in fixed shards, such that no row is lost, doubled, mixed or paid twice.

In: a Job (tables, task, model). Out: a Ledger (a ShardReceipt per shard, each published once) and `read_answers`, which reads
them. Rows that were finished before a crash are found again; a finished job is found done and starts nothing.

    prepare.py  input -> shards          catalog.py  answers made before          shard.py   rows -> published answers
    worker.py   engine <-> shards        shard_requests.py  a shard's rows, keyed   ledger.py  do they add up
    limits.py   when to stop early       watch.py    an engine that hangs         flusher.py rows are safe in time
    lease.py    one driver at a time     parsed_answer.py   a completion's state, answer and confidence

Knows nothing of stages, receipts of stages or what answers are for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from headtail.adapters.cluster import start_cluster, unwrap_error
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, read_table, retry_call
from headtail.batch.catalog import ANSWERS, earlier_jobs, register_job
from headtail.batch.job import JOURNAL, InputTable, Job, ShardReceipt, edition_count, read_receipt
from headtail.batch.ledger import Ledger, close_ledger
from headtail.batch.limits import Limits
from headtail.batch.prepare import InputManifest, prepare_input
from headtail.batch.shard import Shard, count_finished
from headtail.batch.worker import Ask, Worker
from headtail.core.errors import ConfigError, EngineError, HeadtailError, LimitReached, StorageError
from headtail.core.receipt import Receipt

__all__ = [
    "ANSWERS",
    "InputTable",
    "Job",
    "Ledger",
    "Limits",
    "chain_count",
    "find_open_shards",
    "generate",
    "read_answers",
    "remove_work_files",
]

_LONGEST_CHAIN = 16  # shards per Ray task: fewer pauses of the engine between tasks against evener ends
_LOOKUP_THREADS = 16  # threads that check whether shards are done; a check on S3 takes some 20 ms
_REASONS = 3  # of rows without an answer, named when a job stops
_REMOVAL_TRIES = 3  # tries to take away finished work while another driver does the same
_DRIVER_ROWS = 100_000  # rows of a job up to which the driver itself takes answers over: some seconds, where Ray takes 15 to start


def generate(job: Job) -> Ledger:
    """Bring every row of the job to its one state.

    LedgerError when rows do not add up; EngineError when no engine runs; LimitReached when errors, money or time passed
    the job's limits. What is finished is kept in each case.
    """
    store = open_storage(job.root)
    manifest = prepare_input(job)
    register_job(store, job)
    done, asks = find_open_shards(job, store, manifest)
    reports: list[dict[str, Any]] = []
    if asks:
        if done or any(ask.edition for ask in asks):
            again = sum(ask.edition > 0 for ask in asks)
            retried = f", {again} have failed rows to try again" if again else ""
            say(f"  resuming: {len(done)} of {len(done) + len(asks)} shards are done{retried}")
        home, asks = _publish_reused(job, store, manifest, asks)
        done += home
        reports = _spread(job, manifest, asks, done) if asks else []
    made = [ShardReceipt.model_validate(receipt) for one in reports for receipt in one["receipts"]]
    if reason := next((one["stopped"] for one in reports if one.get("stopped")), ""):
        _raise_limit(job, reason, len(done) + len(made), len(done) + len(asks), reports)
    return close_ledger(job, store, manifest, done, made, reports)


def _raise_limit(job: Job, reason: str, done: int, shards: int, reports: Sequence[dict[str, Any]]) -> None:
    reasons: Counter[str] = Counter()
    for one in reports:
        reasons.update(one["reasons"])
    if reasons:
        reason += "; the most frequent reasons in the whole run, rows in flight at the stop included: " + "; ".join(
            f"{count:,} x {text}" for text, count in reasons.most_common(_REASONS)
        )
    fix, value = "finished rows are kept: correct the cause or raise the limit, and run again", f"{done} of {shards} shards are published"
    if job.model.traits.endpoint:
        value += f"; the endpoint is {job.model.base_url} with model {job.name}"
        if not job.limits.priced:
            value += "; what it billed so far is not known, since no price is set"
        fix += "; of an endpoint, model.base_url, model.model and model.request_timeout_s may be the cause"
    raise LimitReached(f"stopped early: {reason}", where=job.path, value=value, fix=fix)


def find_open_shards(job: Job, store: Storage, manifest: InputManifest) -> tuple[list[ShardReceipt], list[Ask]]:
    """What is published and needs nothing more, and what is to be done. Failed rows of a published shard are done again."""
    numbers = sorted({shard for part in manifest.parts for shard in part.shards})

    def read_or_ask(number: int) -> ShardReceipt | Ask:
        edition = edition_count(job, store, number)
        if not edition:
            return Ask(number, 0)
        receipt = read_receipt(job, store, number, edition - 1)
        return Ask(number, edition) if receipt.retryable(job.max_runs_per_row) else receipt

    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        found = list(pool.map(read_or_ask, numbers))
    return [one for one in found if isinstance(one, ShardReceipt)], [one for one in found if isinstance(one, Ask)]


def chain_count(shards: int, workers: int) -> int:
    """Ray tasks to spread `shards` over: long chains keep engines full, and each worker gets four tasks or more if it can."""
    length = min(_LONGEST_CHAIN, max(1, shards // (4 * workers))) if shards >= 8 * workers else -(-shards // workers)
    return -(-shards // length)


def _publish_reused(job: Job, store: Storage, manifest: InputManifest, asks: Sequence[Ask]) -> tuple[list[ShardReceipt], list[Ask]]:
    """Publish shards whose rows were all answered before, up to the first that has a row to ask; the shards for the workers too."""
    before = earlier_jobs(store, job)
    made: list[ShardReceipt] = []
    if before and manifest.rows <= _DRIVER_ROWS:
        for ask in asks:
            shard = Shard(job, store, manifest, ask.shard, ask.edition, uuid.uuid4().hex[:8], before)
            if shard.todo:
                break
            made.append(shard.publish())
    return made, list(asks[len(made) :])


def _spread(job: Job, manifest: InputManifest, asks: Sequence[Ask], done: Sequence[ShardReceipt]) -> list[dict[str, Any]]:
    """Run `asks` on the job's workers with Ray Data; what each task reported."""
    import ray

    from headtail.adapters.meter import job_meter

    start_cluster()
    _check_room(job)
    count = chain_count(len(asks), job.workers)
    items = [{"shard": ask.shard, "edition": ask.edition} for ask in asks]
    total = sum(part.file.rows or 0 for part in manifest.parts)
    states: Counter[str] = Counter()
    for receipt in done:
        states.update(receipt.states)

    def judge(progress: Mapping[str, float], wall: float) -> str:
        kept = {name: rows + progress.get(name, 0.0) for name, rows in count_finished(states).items()}
        return job.limits.problem({**progress, **kept}, wall)

    with job_meter(f"{job.task.name} by {job.name}", total, done=states.total(), judge=judge) as meter:
        asked = ray.data.from_items(items, override_num_blocks=count).map_batches(
            Worker,
            fn_constructor_kwargs={"job": job, "manifest": manifest, "run": uuid.uuid4().hex[:8], "meter": meter},
            batch_size=-(-len(asks) // count),
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(job.workers, count)),
            num_cpus=job.model.cpus,
            num_gpus=job.model.gpus or None,
            resources=dict(job.model.resources) or None,
        )
        try:
            return [json.loads(row["report"]) for row in asked.iter_rows()]
        except ray.exceptions.RayError as error:
            raise engine_error(error) from error


def _check_room(job: Job) -> None:
    """ConfigError when the workers can never start; on a cluster that can grow, a line that says what is waited for."""
    import ray

    have = ray.cluster_resources()
    for name, each in {"CPU": job.model.cpus, "GPU": job.model.gpus, **job.model.resources}.items():
        if each * job.workers <= have.get(name, 0):
            continue
        text = f"{job.workers} workers x {each:g} {name} are needed, the cluster has {have.get(name, 0):g}"
        if not (os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID")):
            fix = f"lower `workers` or what each worker needs (model.{name.lower()}s), or join a larger cluster"
            raise ConfigError(text, where="workers, model", fix=fix)
        say(f"  {text}: waiting for nodes to come up")


def engine_error(error: BaseException) -> HeadtailError:
    """The deliberate error inside what Ray wraps around it, else an EngineError."""
    fix = "run again to resume; HEADTAIL_WORKER_LOGS=1 shows the workers' output"
    return unwrap_error(error, EngineError, "a worker broke", fix=fix)


def remove_work_files(store: Storage, job: Job) -> None:
    """Remove the segments and journals of a job whose shards are all published.

    Journals are removed first: a journal without its segments would cause rows to be asked again when a shard with failed rows is reopened.
    """
    folder, files = store.full(job.shards_folder), store.filesystem
    for _ in range(_REMOVAL_TRIES):
        try:
            if retry_call(lambda: files.get_file_info(folder)).type != pafs.FileType.Directory:
                return
            inside = retry_call(lambda: files.get_file_info(pafs.FileSelector(folder)))
            shards = [found.path for found in inside if found.type == pafs.FileType.Directory]
            with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
                list(pool.map(partial(_remove_folder, files), [f"{shard}/{JOURNAL}" for shard in shards]))
            retry_call(lambda: files.delete_dir(folder))
        except FileNotFoundError:
            continue  # another driver removes them too: what it took away is gone, which is all that is wanted
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                what = f"the job is done, but its work folder cannot be removed: {error}"
                raise StorageError(what, where=store.uri(job.shards_folder), fix="run again: it is removed then") from error
            # another driver, late, put a file there meanwhile: it will remove it in its turn


def _remove_folder(files: pafs.FileSystem, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        retry_call(lambda: files.delete_file(path))


def read_answers(store: Storage, receipt: Receipt, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The answers that a precompute receipt names, a shard at a time, in order of shard."""
    for name in sorted(receipt.outputs):
        if name.startswith(ANSWERS):
            yield read_table(store, receipt.outputs[name], columns)
