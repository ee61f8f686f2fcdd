"""Precompute: the answers to whole tables of queries, by a teacher or a batch student. One stage for both.

In: table references (plan:head, plan:teacher_sample, ...), a task, a model. Out: answer tables in shards, each row in
exactly one state, a ledger that proves that they add up, tokens, seconds and money. Only `answered` rows may go further.
Does not decide which queries are answered or how answers are used.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, check_digest, column_bytes, open_storage, read_json
from headtail.adapters.storage.receipts import load_receipt, load_ref
from headtail.batch import ANSWERS, InputTable, Job, Ledger, Limits, generate, remove_work_files
from headtail.batch.lease import hold_lease
from headtail.batch.limits import UNPRICED
from headtail.core.config import StageConfig, execution, result_fields
from headtail.core.errors import ConfigError, EngineError, InputError, LimitReached
from headtail.core.evidence import JobFigures
from headtail.core.receipt import Receipt, receipt_path
from headtail.core.rows import TOP, State
from headtail.core.task import Task, load_task
from headtail.engines import ModelConfig, check_key, check_top
from headtail.engines.device import resolve_dtype
from headtail.engines.models import ResolvedModel, find_model
from headtail.engines.tokens import load_tokenizer, vocabulary_fingerprint
from headtail.stages.base import Stage, identity, run_once
from headtail.stages.precompute.dry_run.preview import ROWS, Preview, finished_preview, preview, preview_outcome
from headtail.stages.precompute.result import AnsweringModel, JobRows, PlannedActual, Result

LOAD = ("occupancy", "occupancy_fed", "prefix_hit_rate")  # of an engine that says so: see docs/engines.md
USD_PER_HOUR = 0.09  # of one worker, where a config names no price: a 2-core cloud machine; an assumption, see docs/cost.md
_ENDINGS = {state: "failed" if state == State.FAILED else f"are {state}" for state in State}  # of rows, in a sentence


class Config(StageConfig):
    """What to answer and with what."""

    task: str = Field("query_segmentation", description="task name or folder")
    inputs: tuple[str, ...] = Field(
        ("plan:head", "plan:teacher_sample", "plan:human_labels"),
        min_length=1,
        description="table references; a row that is in several tables is answered once",
    )
    source: Literal["teacher", "batch_student", "realtime_student"] = Field(
        "teacher", description="answer source that is recorded with each row: teacher or batch_student"
    )
    model: ModelConfig = Field(ModelConfig(), description="the model and its engine")
    side_inputs: bool = Field(True, description="ask rows with their side inputs; false: without them, as in live traffic")
    workers: int = execution(1, "engines that run side by side", ge=1)
    shards: int = execution(0, "files over which rows are spread; 0 chooses; a job's first run fixes the number", ge=0, le=1_000_000)
    flush_rows: int = execution(10_000, "finished rows of a shard after which they are written to the store", ge=1)
    flush_seconds: float = execution(10.0, "seconds after which the finished rows of a shard are written to the store", gt=0)
    attempts: int = execution(3, "how often a row is asked in one run while its errors are transient", ge=1)
    max_runs_per_row: int = execution(
        2,
        "runs, over all jobs, in which a row is asked that ends the same way each time for a lasting reason (too long, invalid, "
        "refused, an HTTP 400); it is then left as it is. 0: no limit",
        ge=0,
    )
    reuse: bool = execution(True, "reuse answers that earlier jobs in this store made under the same answer_key")
    reuse_jobs: int = execution(20, "how many earlier jobs, newest first, are searched for such answers", ge=1)
    retry: tuple[State, ...] = Field(
        (State.FAILED,), description="states in which an answer of an earlier job is asked again instead of reused"
    )
    ask_again: int = Field(
        0,
        ge=0,
        description="raise it by one to ask rows in a state of `retry` again after the job succeeded; other answers are reused",
    )
    keep_logprobs: bool = Field(True, description="keep the log-prob of each token of an answer: 4 bytes a token before compression")
    top_logprobs: int = Field(
        0,
        ge=0,
        le=256,
        description="how many of the likeliest tokens to keep at each token of an answer, for a student to learn from: 6 bytes each before "
        "compression; 0: none. Only a decoder that vLLM runs has them",
    )
    max_failed_share: float = execution(
        0.05, "share of failed rows (0..1) above which the job stops, early when that is certain; finished rows are kept", ge=0, le=1
    )
    max_unanswered_share: float = execution(
        0.5,
        "share of rows without an answer (0..1; truncated, invalid, refused, failed) above which the job stops in the same way",
        ge=0,
        le=1,
    )
    budget_usd: float = execution(0.0, "USD that this job may cost, earlier runs of it included; it then stops; 0: no limit", ge=0)
    budget_seconds: float = execution(0.0, "seconds that one run may take before it stops; 0: no limit", ge=0)
    stall_seconds: float = execution(
        600.0, "seconds without a finished row after which an engine counts as hanging and is started again; 0: never", ge=0
    )


class _Sources(NamedTuple):
    """What a config names, found in the store. `identity`: what the stage's fingerprint is made over, besides the config."""

    store: Storage
    task: Task
    model: ResolvedModel
    tables: tuple[InputTable, ...]
    identity: dict[str, Any]


def _resolve_model(config: Config) -> Config:
    """`config` with what its model leaves to the machine decided here, once for all workers."""
    return config.model_copy(update={"model": resolve_dtype(config.model)})


def _find(config: Config, task: Task | None = None) -> _Sources:
    if config.budget_usd and not config.model.priced:
        raise ConfigError(
            f"a budget in USD cannot be kept: {UNPRICED}", where="budget_usd", value=config.budget_usd, fix="set a price, or 0"
        )
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    found = [load_ref(store, ref) for ref in config.inputs]
    labels = tuple(f"{receipt.path}:{name}" for receipt, name in found)
    if len(set(labels)) < len(labels):
        raise InputError("the same table is named twice", where="inputs", value=", ".join(labels), fix="name each table once")
    model = find_model(config.model, store, fetch=False)
    if config.top_logprobs:
        check_top(config.model, model.io_format.kind)
    tables = tuple(
        InputTable(check_digest(store, receipt.output(name)), label) for (receipt, name), label in zip(found, labels, strict=True)
    )
    inputs: dict[str, Any] = {label.replace(":", "."): receipt for (receipt, _), label in zip(found, labels, strict=True)}
    # The task by what changes an answer: a changed scorer or fallback asks no row again. The model by its weights.
    inputs |= {"task": task.fingerprint, "model": model.digest}
    replaces = {"task": task.name, "inputs": list(labels), "model": {**result_fields(config.model), "model": model.digest}}
    return _Sources(store, task, model, tables, {"inputs": inputs, "replaces": replaces})


def _job(config: Config, sources: _Sources, path: str) -> Job:
    """The job: of the config every field that a Job has under the same name, and what the config names in the store."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Job) if field.name in Config.model_fields}
    model = sources.model
    fields |= {"root": sources.store.root, "path": path, "task": sources.task, "tables": sources.tables, "limits": limits(config)}
    fields |= {"digest": model.digest, "name": model.name, "io_format": model.io_format.check(sources.task)}
    return Job(**fields)


def _folder(config: Config, sources: _Sources) -> str:
    return receipt_path("precompute", identity("precompute", config, **sources.identity)[1])


def forecast(config: Config, probe: int = ROWS) -> Preview:
    """What `run` would do and what that would cost. `probe`: rows that may be asked to find out; the answers are kept and reused."""
    config = _resolve_model(config)
    sources = _find(config)
    path = _folder(config, sources)
    if sources.store.exists(f"{path}/receipt.json"):
        return finished_preview(path, load_receipt(sources.store, "precompute", path).rows["in"])
    check_key(config.model)
    return preview(_job(config, sources, path), probe)


def run(config: Config, planned: Preview | None = None, task: Task | None = None) -> Receipt[Result]:
    """Answer every row of the inputs once. Found done when nothing that changes an answer changed.

    `planned`: what `forecast` said; LimitReached when its upper bound exceeds a budget, else the receipt has the result beside it.
    `task`: what `config.task` names, where it is loaded already.
    """
    config = _resolve_model(config)
    sources = _find(config, task)
    if planned is not None and planned.path != _folder(config, sources):
        fix = "do a dry run again; name tables by fingerprint (plan/ab12:head) when other jobs write new ones meanwhile"
        raise InputError("the inputs are not those of the dry run", where="inputs", value=planned.path, fix=fix)
    if planned is not None and planned.beyond:
        fix = "raise the budget, or name fewer rows in `inputs`; the probe's answers are kept"
        raise LimitReached(f"not started: {planned.beyond}", where=planned.path, value=f"{planned.ask} rows to ask", fix=fix)

    def work(stage: Stage) -> Result:
        job, begun = _job(config, sources, stage.path), time.monotonic()
        ledger = generate(job)
        wall = time.monotonic() - begun
        _record(stage, config, job, ledger)
        stage.notes += sources.task.notes
        _judge(config, None, job.path, ledger.states, ledger.given_up, ledger.reasons)
        remove_work_files(sources.store, job)
        return _result(config, job, sources, ledger, preview_outcome(planned, ledger, wall) if planned is not None else {})

    folder = _folder(config, sources)
    done = sources.store.exists(f"{folder}/receipt.json")
    if done:
        _judge_done(config, sources.store, folder)
    else:
        check_key(config.model)  # before a cluster starts
    with nullcontext() if done else hold_lease(sources.store, folder):
        receipt = run_once("precompute", Result, config, work, **sources.identity, about=sources.task.name)
    if text := _retry_hint(config, receipt):
        say(f"{'precompute':<12} {text}")
    return receipt


def _retry_hint(config: Config, receipt: Receipt[Result]) -> str:
    """How to ask rows again that ended in a state of `retry` in a job that succeeded."""
    rows = {state: count for state in config.retry if (count := receipt.rows.get(state, 0))}
    if not rows:
        return ""
    text = f"{' and '.join(f'{count:,} rows {_ENDINGS[state]}' for state, count in rows.items())}; "
    text += f"--set ask_again={config.ask_again + 1} asks them again"
    runs, given_up = receipt.result.max_runs_per_row, min(receipt.result.given_up, sum(rows.values()))
    if given_up and 0 < config.max_runs_per_row <= runs:
        text += f", {given_up:,} of them only with --set max_runs_per_row={runs + 1} or more"
    return text


def _judge(
    config: Config, receipt: Receipt | None, path: str, states: Mapping[str, int], given_up: int, reasons: Mapping[str, int]
) -> None:
    """EngineError when too many rows failed or have no answer. What is finished stays; the next run asks the failed rows again.

    `receipt`: of the finished job that is to be reused, which may have been made under other limits; None: the job runs now.
    """
    rows, failed = sum(states.values()), states[State.FAILED]
    unanswered = rows - states[State.ANSWERED]
    again = f"ask_again={config.ask_again + 1} with retry=[...] asks the rows in those states again"
    if failed > config.max_failed_share * rows:
        what = f"{failed} of {rows} rows failed, more than max_failed_share={config.max_failed_share:g}"
        value = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        if receipt is None:
            again = "finished rows are kept, failed ones are asked again"
            if given_up:
                again += f" but for {given_up:,} that were asked in max_runs_per_row={config.max_runs_per_row} runs (raise it to ask them)"
        fix = f"correct the cause and run again: {again}; or raise max_failed_share"
    elif unanswered > config.max_unanswered_share * rows:
        what = f"{unanswered:,} of {rows:,} rows have no answer, more than max_unanswered_share={config.max_unanswered_share:g}"
        value = ", ".join(f"{count:,} {state}" for state, count in states.items() if count)
        fix = "see the answers' columns `reason` and `raw`; change the task (sampling.max_tokens, prompt, schema) or the model, or raise "
        fix += "max_unanswered_share" + ("" if receipt is None else f"; {again}")
    else:
        return
    raise EngineError(what if receipt is None else f"done before, and {what}", where=path, value=value, fix=fix)


def _judge_done(config: Config, store: Storage, path: str) -> None:
    """As `_judge`, of a job that was finished before, perhaps under limits that let more pass."""
    receipt = load_receipt(store, "precompute", path)
    states = {str(state): receipt.rows.get(state, 0) for state in State}
    _judge(config, receipt, path, states, 0, read_json(store, receipt.output("ledger"))["reasons"])


def _record(stage: Stage, config: Config, job: Job, ledger: Ledger) -> None:
    for shard in ledger.shards:
        stage.outputs[f"{ANSWERS}shard-{shard.shard:05d}"] = shard.answers
    stage.json("ledger", ledger.plain())
    stage.rows = job_rows(ledger).plain()
    stage.metrics = {name: value for name, value in job_figures(ledger, limits(config)) if value is not None}
    stage.metrics |= {name: float(ledger.engine[name]) for name in LOAD if name in ledger.engine}
    if not config.model.priced:
        stage.note(f"money is unknown: {UNPRICED}")
    if config.top_logprobs:
        _tell_top(stage, ledger)
    if job.task.side_inputs and not job.side_inputs:
        stage.note("rows were asked without the side inputs that they have")
    for label, names in ledger.missing_side_inputs.items():
        stage.note(f"{label} has no {', '.join(names)}: its rows were asked without")
    if damaged := sum(shard.damaged for shard in ledger.shards):
        stage.note(f"{damaged} finished rows of an earlier run could not be read and were asked again")


def _result(config: Config, job: Job, sources: _Sources, ledger: Ledger, dry_run: dict[str, PlannedActual]) -> Result:
    top, model = config.top_logprobs, sources.model
    return Result(
        source=config.source,
        model=AnsweringModel(name=model.name, digest=model.digest),
        rows=job_rows(ledger),
        figures=job_figures(ledger, limits(config)),
        answer_settings=job.settings,
        io_format=None if job.io_format.default else job.io_format,
        engine=ledger.engine,
        engine_restarts=ledger.restarts,
        given_up=ledger.given_up,
        max_runs_per_row=config.max_runs_per_row,
        usd_per_hour=config.model.usd_per_hour or USD_PER_HOUR,
        top_logprobs=top,
        vocabulary=vocabulary_fingerprint(load_tokenizer(find_model(config.model, sources.store).path, config.model.revision))
        if top
        else "",
        dry_run=dry_run,
    )


def _tell_top(stage: Stage, ledger: Ledger) -> None:
    """What the likeliest tokens cost in the store, compressed."""
    paths = [shard.answers.path for shard in ledger.shards]
    with ThreadPoolExecutor(16) as pool:
        size = sum(pool.map(lambda path: column_bytes(stage.store, path, TOP.names), paths))
    stage.metrics |= {"top_logprobs_bytes": float(size), "top_logprobs_bytes_per_row": size / ledger.rows}


def limits(config: Config) -> Limits:
    """The bounds and prices of a job."""
    return Limits(
        failed_share=config.max_failed_share,
        unanswered_share=config.max_unanswered_share,
        usd=config.budget_usd,
        seconds=config.budget_seconds,
        workers=config.workers,
        usd_per_hour=config.model.usd_per_hour or USD_PER_HOUR,
        usd_per_million_tokens_in=config.model.usd_per_million_tokens_in,
        usd_per_million_tokens_out=config.model.usd_per_million_tokens_out,
        priced=config.model.priced,
    )


def job_rows(ledger: Ledger) -> JobRows:
    """Rows by state, and how they were made."""
    return JobRows(
        offered=ledger.rows,
        states={state: ledger.states[state] for state in State},
        duplicates=ledger.duplicates,
        reused=ledger.reused,
        recomputed=ledger.computed,
        resumed=ledger.rows - ledger.computed - ledger.reused,
    )


def job_figures(ledger: Ledger, prices: Limits) -> JobFigures:
    """Speed, tokens and money. Seconds are those of all runs that made these answers, so a resumed job shows its true cost.

    `usd` is what this job paid; `usd_per_million` what a million such rows cost, those taken over from other jobs at what
    they cost there; `usd_saved` what taking them over saved. None of the three where no price is known.
    """
    rows, workers = ledger.rows, prices.workers
    asked = rows - ledger.reused
    saved = prices.price(ledger.reused_seconds, ledger.reused_tokens_in, ledger.reused_tokens_out)
    usd = prices.price(ledger.seconds + ledger.start_s * workers, *ledger.new_tokens)
    wall = ledger.seconds / workers
    return JobFigures(
        rows_per_s=asked / wall if wall else 0.0,
        tokens_in=float(ledger.tokens_in),
        tokens_out=float(ledger.tokens_out),
        tokens_in_per_row=ledger.tokens_in / rows,
        tokens_out_per_row=ledger.tokens_out / rows,
        engine_start_s=ledger.start_s,
        generate_s=wall,
        answered_share=ledger.states[State.ANSWERED] / rows,
        usd=usd if prices.priced else None,
        usd_saved=saved if prices.priced else None,
        usd_per_million=(usd + saved) / rows * 1e6 if prices.priced else None,
    )
