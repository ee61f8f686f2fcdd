"""The only module that talks to MLflow: a parent run for a pipeline, one run per stage, registered prompts and models.

In: receipts, figures, small tables, evidence. Out: MLflow run ids. A tracking server that is absent, slow, too old or not MLflow
never stops a job and costs it at most LOST_S in all. The first failure is printed once; the receipt in the store stays complete.
The alias `champion` moves by `promote` alone, on evidence that is kept with the model version. Knows nothing of stages.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from headtail.adapters.progress import printable
from headtail.core import record
from headtail.core.config import TrackingConfig
from headtail.core.errors import GateRejected
from headtail.core.evidence import Evidence, read_evidence
from headtail.core.secrets import hide, hide_in

T = TypeVar("T")
CHAMPION, CHALLENGER = "champion", "challenger"  # what passed its gate; what has not, or not yet
_EVIDENCE = "gate.evidence"  # tag of a model version: the whole evidence as JSON
_SHOWN_CHARS = 300  # of an error that a warning shows
LOST_S = 30.0  # what a process may lose on one tracking server, over all its stages
SLOW_S = 1.0  # a call that takes longer than this is time lost


def tracking_uri(config: TrackingConfig, root: str) -> str:
    """The MLflow URI in force: config, then environment, then a SQLite file in the (local) store."""
    if config.uri:
        return config.uri
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    folder = Path("build/quickstart") if "://" in root else Path(root)
    return f"sqlite:///{folder.expanduser().resolve() / 'mlflow.db'}"


class _Losses:
    """What a process has lost on one tracking server so far, and what it said about it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.said: set[str] = set()


@lru_cache(maxsize=64)
def _losses(uri: str) -> _Losses:
    """One for a server, since each stage of a job has a Tracker of its own."""
    return _Losses()


class Tracker:
    """MLflow behind a fuse: after the first failure it says so once and every call returns None."""

    def __init__(self, config: TrackingConfig, root: str) -> None:
        self.config, self.uri = config, tracking_uri(config, root)
        self._client: Any = None
        self._experiment: str = ""
        self.broken = not config.enabled

    def guard(self, action: Callable[[Any], T]) -> T | None:
        """`action(client)`, or None when tracking is off, out of reach, or lacks what the action needs."""
        if self.broken or _losses(self.uri).seconds >= LOST_S:
            self.broken = True
            return None
        try:
            return action(self.client) if self.uri.startswith("sqlite:") else self._in_time(lambda: action(self.client))
        except Exception as error:  # any fault of the tracking server, whatever its class
            if self._experiment and getattr(error, "error_code", "") == "ENDPOINT_NOT_FOUND":
                self._say("it is older than this MLflow client, which asks for what it does not have; all else is logged", error)
                return None
            self.broken = True
            self._say("out of reach, going on without it; receipts in the store stay complete; check MLFLOW_TRACKING_URI", error)
            return None

    def _say(self, what: str, error: Exception) -> None:
        """A warning in one line, once in this process for each server."""
        if what not in _losses(self.uri).said:
            _losses(self.uri).said.add(what)
            reason = hide(" ".join(str(error).split()))  # a server that is no MLflow answers with a whole page
            shown = reason if len(reason) <= _SHOWN_CHARS else f"{reason[:_SHOWN_CHARS].rpartition(' ')[0] or reason[:_SHOWN_CHARS]} [...]"
            print(printable(f"warning: MLflow at {hide(self.uri)}: {what}: {shown}"), file=sys.stderr)

    def _in_time(self, call: Callable[[], T]) -> T:
        """What `call` returns, unless it takes more than is left of LOST_S: a server may accept, and answer never or byte by byte."""
        _quiet_mlflow()  # imports it: seconds that are not the server's
        ended: list[tuple[T | None, BaseException | None]] = []

        def work() -> None:
            try:
                ended.append((call(), None))
            except BaseException as error:
                ended.append((None, error))

        lost, began = _losses(self.uri), time.monotonic()
        thread = threading.Thread(target=work, daemon=True, name="headtail-tracking")
        thread.start()
        thread.join(LOST_S - lost.seconds)
        took = time.monotonic() - began
        lost.seconds += took if took > SLOW_S or not ended else 0.0
        if not ended:
            raise TimeoutError(f"no answer for {lost.seconds:.0f} s; this process does not ask it again")
        value, error = ended[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    @property
    def client(self) -> Any:
        """A started MlflowClient; makes the SQLite file's folder and the experiment on first use."""
        if self._client is None:
            mlflow = _quiet_mlflow()
            artifacts = None
            with warnings.catch_warnings(), contextlib.ExitStack() as alone:
                warnings.simplefilter("ignore")
                if self.uri.startswith("sqlite:///"):
                    folder = Path(self.uri.removeprefix("sqlite:///")).parent
                    folder.mkdir(parents=True, exist_ok=True)
                    artifacts = (folder / "mlartifacts").as_uri()
                    alone.enter_context(_file_lock(folder / ".mlflow.lock"))
                # never mlflow.set_tracking_uri: it writes to this process's environment, and so to the next tracker
                self._client = mlflow.MlflowClient(self.uri, self.uri)
                self._experiment = _experiment(self._client, self.config.experiment, artifacts)
        return self._client

    def start(self, name: str, tags: Mapping[str, str] | None = None, parent: str = "") -> str:
        """A new run's id, nested under `parent` or the config's parent; empty when tracking is off."""
        parent = parent or self.config.parent_run

        def begin(client: Any) -> str:
            all_tags = {"headtail.stage": name, **hide_in(tags or {}), **({"mlflow.parentRunId": parent} if parent else {})}
            return str(client.create_run(self._experiment, tags=all_tags, run_name=self.config.run_name or name).info.run_id)

        return self.guard(begin) or ""

    def log(self, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str] | None = None) -> None:
        """Parameters (cut at MLflow's 6000 characters), metrics and tags of a run."""
        if not run_id:
            return

        def write(client: Any) -> None:
            from mlflow.entities import Metric, Param, RunTag
            from mlflow.utils.time import get_current_time_millis

            now = get_current_time_millis()
            found_params = [Param(_name(key), hide(str(value))[:6000]) for key, value in params.items()]
            found_metrics = [Metric(_name(key), float(value), now, 0) for key, value in metrics.items() if value == value]
            found_tags = [RunTag(key, hide(str(value))[:5000]) for key, value in (tags or {}).items()]
            for start in range(0, max(len(found_params), len(found_metrics), len(found_tags)), 100):
                window = slice(start, start + 100)
                client.log_batch(run_id, found_metrics[window], found_params[window], found_tags[window])

        self.guard(write)

    def artifact(self, run_id: str, local: Path, folder: str | None = None) -> None:
        """A local file (or folder) as an artifact of a run."""
        if run_id:
            method = "log_artifacts" if local.is_dir() else "log_artifact"
            self.guard(lambda client: getattr(client, method)(run_id, str(local), folder))

    def dataset(self, run_id: str, name: str, digest: str, source: str, context: str) -> None:
        """A dataset input of a run: name, digest and where it is."""

        def write(client: Any) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            entity = Dataset(name=name, digest=digest[:36], source_type="local", source=f'{{"uri": "{hide(source)}"}}')
            client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

        if run_id:
            self.guard(write)

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run: FINISHED, FAILED or KILLED."""
        if run_id:
            self.guard(lambda client: client.set_terminated(run_id, status))

    def prompt(self, name: str, template: list[dict[str, str]] | str, tags: Mapping[str, str]) -> str:
        """Register a prompt (a new version only when its text changed); returns `name/version`."""

        def write(client: Any) -> str:
            found = client.search_prompt_versions(name) if _prompt_exists(client, name) else []
            for version in found:
                if version.tags.get("fingerprint") == tags.get("fingerprint"):
                    return f"{name}/{version.version}"
            made = client.register_prompt(name=name, template=template, tags=hide_in(tags))
            return f"{name}/{made.version}"

        return self.guard(write) or ""

    def model_version(self, name: str, source: str, run_id: str, tags: Mapping[str, str], description: str) -> str:
        """Register a model version pointing at `source`; returns its version, empty when tracking is off."""

        def write(client: Any) -> str:
            from mlflow.exceptions import MlflowException

            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if "RESOURCE_ALREADY_EXISTS" not in str(error.error_code):
                    raise
            for version in client.search_model_versions(f"name='{name}'"):
                if version.tags.get("fingerprint") == tags.get("fingerprint"):
                    return str(version.version)
            said = hide_in({"tags": tags, "description": description})
            made = client.create_model_version(name, source=source, run_id=run_id or None, **said)
            return str(made.version)

        return self.guard(write) or ""

    def challenge(self, name: str, version: str) -> None:
        """Point `challenger` at a version: registered, not promoted."""
        if version:
            self.guard(lambda client: client.set_registered_model_alias(name, CHALLENGER, version))

    def promote(self, name: str, version: str, evidence: Mapping[str, Any] | Evidence, doubts: Sequence[str] = ()) -> bool:
        """Keep the evidence with a model version, then make the version `champion`. False when tracking is off or out of reach.

        GateRejected, and `champion` stays where it is, when the evidence is not complete, did not pass, or is of another model than
        the version's (its tag `path`), or when there are `doubts`: what came of computing it anew. Evidence that can be read is kept in
        any case, so that a rejection is in the registry too.
        """
        record = read_evidence(evidence)
        missing = record.missing() or list(doubts)
        if not version:
            if missing:
                raise _rejection(name, version, missing)
            return False

        def keep(client: Any) -> list[str]:
            held = client.get_model_version(name, version).tags
            if held.get("path") != record.candidate:
                origin = held.get("path") or "of unknown origin (it has no tag path)"
                return [f"evidence of this version: the given evidence is of {record.candidate}, the version is {origin}"]
            tags = {_name(key): value for key, value in record.tags().items()}
            for key in [key for key in held if key.startswith("gate.") and key not in tags]:
                client.delete_model_version_tag(name, version, key)  # of an earlier gate that asked for something else
            for key, value in tags.items():
                client.set_model_version_tag(name, version, key, value)
            if not missing:  # last: a reader who sees the alias also sees the evidence
                client.set_registered_model_alias(name, CHAMPION, version)
            return missing

        problems = self.guard(keep)
        if problems or missing:
            raise _rejection(name, version, problems or missing)
        return problems is not None

    def evidence(self, name: str, alias: str = CHAMPION) -> Evidence | None:
        """The evidence kept with the version that an alias points to; None when there is none, or tracking is off."""

        def read(client: Any) -> str:
            held = client.get_registered_model(name).aliases
            return str(client.get_model_version_by_alias(name, alias).tags.get(_EVIDENCE, "")) if alias in held else ""

        text = self.guard(read)
        return read_evidence(record.parse_object(text, f"{name}, tag {_EVIDENCE}", GateRejected, "run: headtail gate")) if text else None


def _quiet_mlflow() -> Any:
    """The module, imported with few retries and little output."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # read when mlflow is first imported
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow
    return mlflow


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold a lock file: MLflow makes the tables of a new database without one, and the second of two first jobs finds half of them."""
    with path.open("w") as file:
        end = time.monotonic() + 2 * LOST_S  # making the tables takes some 5 s
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # no locks on this file system
                break
        yield


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """The id of the experiment, which another first job may make at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    try:
        return str(found.experiment_id if found else client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        if "RESOURCE_ALREADY_EXISTS" not in str(error.error_code):
            raise
        return str(client.get_experiment_by_name(name).experiment_id)


def _rejection(name: str, version: str, missing: list[str]) -> GateRejected:
    where = f"{name} version {version or '-'}"
    return GateRejected(f"{CHAMPION} does not move; missing: {'; '.join(missing)}", where=where, fix="see the gate's receipt")


def _prompt_exists(client: Any, name: str) -> bool:
    return any(prompt.name == name for prompt in client.search_prompts(filter_string=f"name='{name}'"))


def _name(key: str) -> str:
    """A name MLflow takes: letters, digits, _ - . space / only."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)[:250]
