"""The settings of a server: what is served, where, and what it may cost a caller.

In: YAML and `--set`. Out: a frozen Config, which front processes and students get whole. What each task has of its own is in
TaskSettings; the rest is the server's and stands once. Knows nothing of how it is served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from headtail.core.config import Config as BaseConfig
from headtail.core.config import StageConfig, execution
from headtail.engines import ModelConfig
from headtail.stages.serve.dynamic import DynamicConfig
from headtail.stages.serve.escalation import EscalationConfig
from headtail.stages.serve.replica_range import ReplicaRange
from headtail.stages.serve.shadow import ShadowConfig
from headtail.stages.serve.tracing import TraceConfig

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


class RealtimeModel(ModelConfig):
    """The engine of the realtime student. `model` empty: the release's own student."""

    model: str = Field("", description="empty: the student that the release names; else this model instead, such as example:teacher")


class TaskSettings(BaseConfig):
    """What is served of one task, and what it may cost its callers."""

    release: str = Field("current", description="`current` follows promotions and rollbacks; a release id serves that release only")
    model: RealtimeModel = Field(RealtimeModel(), description="engine of the realtime student")
    realtime_student: bool = Field(True, description="start the realtime student; off: misses get the fallback")
    realtime_timeout_ms: int = Field(
        2000, ge=1, le=600_000, description="milliseconds a miss waits for the student before it gets the fallback"
    )
    dynamic: DynamicConfig = Field(DynamicConfig(), description="the student's answers, given again")
    escalation: EscalationConfig = Field(EscalationConfig(), description="a bigger model for misses of which the student is unsure")
    shadow: ShadowConfig = execution(ShadowConfig(), "a sample of the answers, asked again of another model off the way of requests")
    answers_timeout_ms: int = execution(
        8000, "milliseconds that a call of /v1/answers may take; misses that are not answered by then get the fallback", ge=1, le=600_000
    )
    max_misses: int = execution(
        64, "misses of one front process that may wait for the student of one release at once; the next one gets the fallback", ge=1
    )
    realtime_replicas: Annotated[int, Field(ge=1)] | ReplicaRange = execution(
        1, "student engines: a number, or a range {min, max} within which Ray Serve keeps them by their queue"
    )
    max_query_chars: int = Field(200, ge=1, le=10_000, description="characters of a normalised query; longer ones are refused with 422")
    refresh_s: float = execution(5.0, "seconds between checks of CURRENT", gt=0)
    swap_wait_s: float = execution(300.0, "maximum seconds that a promoted release waits for its student before it is served without", ge=0)
    keep_student_s: float = execution(
        60.0,
        "seconds that the student, and the local copy of the snapshot, of the release before stay, so that a rollback finds them",
        ge=0,
    )
    count_canary: bool = execution(
        True, "count outcomes for the comparison of a canary; with several servers of one store: true on one of them, false on the others"
    )
    cache_dir: str = execution("", "local folder for copies of snapshots; needed when root is a network mount, else chosen when root is S3")
    request_log: bool = execution(True, "write a line per request (redacted) into the store, below requests/")
    log_rotate_s: float = execution(60.0, "seconds after which a file of the request log is finished", gt=0)
    log_rotate_rows: int = execution(100_000, "rows after which a file of the request log is finished: what it takes of memory", ge=1)


class FurtherTask(TaskSettings):
    """A task besides the first, in the same server. What it does not set has the default, not the first task's value."""

    root: str = Field(description="store of this task: a directory or s3://bucket/prefix; no two tasks share one")
    allow_task_code: bool = execution(False, "allow this task's `answer` to name Python code, which then runs")
    link_port: int = execution(
        0,
        "first port of this task's link, where link_host is set; 0: the server's link_port and `fronts` more for each task before",
        ge=0,
        le=65535,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_settings_of_the_server(cls, data: Any) -> Any:
        mine = sorted(set(data) & (set(Config.model_fields) - set(cls.model_fields))) if isinstance(data, Mapping) else []
        if mine:
            raise ValueError(f"{', '.join(mine)} holds for the whole server: set it beside `tasks`, not in a task")
        return data


class Config(TaskSettings, StageConfig):
    """What is served, where, and what it may cost a caller."""

    host: str = execution("127.0.0.1", "address to listen on; 0.0.0.0 for every interface: set api_keys then, or put a gateway before it")
    port: int = execution(8000, "TCP port", ge=1, le=65535)
    api_keys: str = execution("", "file of API keys, which `headtail keys` writes; empty: everyone who reaches the server may ask")
    limits_redis_url: str = execution(
        "", "redis://HOST:PORT/NUMBER where all servers count what a key asks; needs the extra `redis`; empty: each node counts for itself"
    )
    traces: TraceConfig = execution(TraceConfig(), "where traces of requests go, and of how many")
    fronts: int = execution(2, "front processes, which share the port", ge=1, le=64)
    max_body_bytes: int = execution(1 << 20, "bytes of a request's body; more are refused with 413", ge=1024)
    max_header_bytes: int = execution(16_384, "bytes of a request's line and headers; more are refused with 431", ge=8192)
    header_timeout_s: float = execution(10.0, "seconds for a request's headers to arrive, else the connection is closed", gt=0)
    body_timeout_s: float = execution(10.0, "seconds for a request's body to arrive, else 408", gt=0)
    away_s: float = execution(30.0, "seconds without a connection to any front after which a student ends", gt=0)
    drain_s: float = execution(30.0, "maximum seconds for requests in flight to end when the server is stopped", gt=0)
    start_timeout_s: float = execution(300.0, "maximum seconds for the start", gt=0)
    admin_host: str = execution("127.0.0.1", "address of the try-it page, /docs and /metrics")
    admin_port: int = execution(0, "port of the try-it page, /docs and /metrics; 0: the one after `port`", ge=0, le=65535)
    admin_calls: bool = execution(
        False, "take calls below /admin/ on the pages' port, with a key of scope `admin`: releases, overrides, deletions; needs api_keys"
    )
    students: Literal["here", "elsewhere"] = execution(
        "here", "here: started on Ray with this server; elsewhere: another job or a RayService runs them, and they connect to link_address"
    )
    link_address: str = execution("", "name or address by which students elsewhere reach `link_host`")
    link_host: str = execution("", "address where fronts take connections of students on other nodes; empty: students run on this node")
    link_port: int = execution(8100, "first port for that; each front process takes one", ge=1, le=65535)
    link_token_file: str = execution("", "file with the secret that such students send; the same file on every node")
    tasks: dict[str, FurtherTask] = execution(
        {}, "further tasks of this server by name: the `model` of /v1/chat/completions, and the path /tasks/NAME before /v1/"
    )

    @field_validator("tasks")
    @classmethod
    def _check_names(cls, tasks: dict[str, FurtherTask]) -> dict[str, FurtherTask]:
        for name in tasks:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name[:80]!r} cannot be part of a URL as it is: name a task with small letters, digits, _ and -")
        return tasks

    def of_task(self, name: str) -> Config:
        """The settings of a further task, as a server with that task alone would have them."""
        task = self.tasks[name]
        mine = {field: getattr(task, field) for field in FurtherTask.model_fields}
        at = list(self.tasks).index(name) + 1
        return self.model_copy(update={**mine, "link_port": task.link_port or self.link_port + at * self.fronts, "tasks": {}})

    @property
    def admin(self) -> int:
        """The port of the pages."""
        return self.admin_port or self.port + 1

    @property
    def url(self) -> str:
        """How this machine reaches the server."""
        return _reached(self.host, self.port)

    @property
    def admin_url(self) -> str:
        """How this machine reaches the pages."""
        return _reached(self.admin_host, self.admin)

    @property
    def copies(self) -> Path | None:
        """Where snapshots are copied to, or None to let the store decide."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else None


def _reached(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"
