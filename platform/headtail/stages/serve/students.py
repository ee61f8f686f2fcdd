"""The students on Ray Serve: one application per student, placed, watched and replaced by Serve, asked over the link and not through it.

In: a release, addresses of the fronts. Out: an application whose replicas are warm before they connect to the fronts. Serve's own HTTP
server is not started. Knows nothing of processes or of how a release becomes current.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from headtail.adapters import cluster
from headtail.adapters.storage import Storage
from headtail.core.errors import ConfigError, EngineError
from headtail.core.keys import fingerprint
from headtail.core.task import Task
from headtail.engines import ENGINES, ModelConfig
from headtail.engines.device import resolve_dtype
from headtail.engines.models import find_model
from headtail.engines.open import check_key
from headtail.releases import release as releases
from headtail.stages.serve.answerer import ANY_RELEASE, ESCALATION
from headtail.stages.serve.config import Config
from headtail.stages.serve.frames import Hello
from headtail.stages.serve.replica_range import QUEUE, ReplicaRange
from headtail.stages.serve.student_link import FrontAddress, FrontLinks

T = TypeVar("T")
WARM_UP = "warm up"
# Ray 2.60 registers a module for the whole process while it makes a deployment or reads a status: of two threads one would fail.
_SERVE = threading.Lock()
_STARTING = threading.Lock()  # followers of two tasks may start their first student in the same moment
_WITHOUT_GCS_S = 2_000_000  # 23 days; Ray counts it in ms of 32 bits
_ANSWER_S = 20.0  # a controller whose GCS is dead answers never
_LOGGING: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}


class ServedStudent(NamedTuple):
    """The model that answers misses of a release, and the digest of its weights where the deployment is started."""

    model: ModelConfig
    digest: str
    stands_for: str
    task: Task

    @property
    def mark(self) -> str:
        """The same for two releases that one deployment can serve."""
        parts = [self.model.model_dump(mode="json"), self.digest, self.stands_for, self.task.fingerprint]
        return fingerprint(parts, "student")[:8]


def resolve_student(config: Config, store: Storage, release: releases.Release) -> ServedStudent | None:
    """The student of a release, or None when it is switched off or the release has none. A missing model is an error here."""
    if not config.realtime_student:
        return None
    model = resolve_dtype(config.model.model_copy(update={"model": config.model.model or release.student}))  # once for all replicas
    if not model.model:
        return None
    if not model.traits.in_process:
        here = ", ".join(name for name, traits in ENGINES.items() if traits.in_process)
        fix = f"set model.engine to one of {here}, or realtime_student=false"
        raise ConfigError("the realtime student must run in the server's own processes", where="model.engine", value=model.engine, fix=fix)
    return _serve_model(model, store, release, ANY_RELEASE if config.model.model else release.student)


def resolve_bigger(config: Config, store: Storage, release: releases.Release) -> ServedStudent | None:
    """The bigger model of the escalation tier under a release's task, or None when there is none, or no student that could be unsure."""
    if not (config.escalation.enabled and config.realtime_student and (config.model.model or release.student)):
        return None
    model = resolve_dtype(ModelConfig.model_validate(config.escalation.model.model_dump()))
    if not (model.traits.in_process or model.traits.endpoint):
        able = ", ".join(name for name, traits in ENGINES.items() if traits.in_process or traits.endpoint)
        fix = f"set it to one of {able}"
        raise ConfigError("this engine cannot serve", where="escalation.model.engine", value=model.engine, fix=fix)
    if model.traits.endpoint:  # one try, no longer than the front waits; and it computes nothing here
        model = model.model_copy(update={"request_timeout_s": config.escalation.timeout_ms / 1000, "cpus": 0.0, "gpus": 0.0})
        check_key(model)
    return _serve_model(model, store, release, ESCALATION)


def _serve_model(model: ModelConfig, store: Storage, release: releases.Release, stands_for: str) -> ServedStudent:
    """A model under a release's task. ConfigError when it is missing or cannot answer the task."""
    found, task = find_model(model, store, fetch=False), releases.open_task(release)  # each replica fetches for itself
    found.io_format.check(task)
    folder = Path(model.model).expanduser()
    if model.traits.in_process and folder.is_dir():
        model = model.model_copy(update={"model": str(folder.resolve())})
    return ServedStudent(model, found.digest, stands_for, task)


def resolve_models(config: Config, store: Storage, release: releases.Release) -> list[ServedStudent]:
    """What answers misses of a release: its student, and the bigger model."""
    return [found for found in (resolve_student(config, store, release), resolve_bigger(config, store, release)) if found is not None]


class StudentReplica:
    """A Serve replica: a student, and its links to the fronts. `kind`: its class, another one in tests; `leaves`: whether it ends its
    application when no front is reached any more, since the server that started it was killed."""

    def __init__(
        self, kind: type, root: str, served: ServedStudent, fronts: Sequence[FrontAddress], token_file: str, away_s: float, leaves: bool
    ) -> None:
        self._away_s, self._leaves = away_s, leaves
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._student = kind(served.model, root, served.task, served.stands_for, served.digest)
        token = Path(token_file).read_text(encoding="utf-8").strip() if token_file else ""
        fronts = [front._replace(host=os.path.expandvars(front.host)) for front in fronts]  # a name that only its node knows
        hello = Hello(served.stands_for, served.task.fingerprint, served.model.model, token)
        self._links = FrontLinks(fronts, hello, self._student.answer)
        self._warms = not served.model.traits.endpoint  # an endpoint may be down at the start: fronts then keep the student's answers
        self._started = False

    async def reconfigure(self, options: dict[str, Any]) -> None:
        """Called by Serve before the replica counts as ready: one answer, or the first caller waits 2 s for the grammar; then the links."""
        if self._started:
            return
        self._started = True
        if self._warms:
            await self._student.answer(options["query"], {})
        self._links.start()
        async with asyncio.timeout(options["connect_s"]):
            while self._links.connected < self._links.fronts:
                await asyncio.sleep(0.02)

    async def check_health(self) -> None:
        """Raises when the engine is dead or no front is reached, so that Serve replaces the replica."""
        await self._student.check()
        try:
            self._links.check(self._away_s)
        except ConnectionError:
            if self._leaves:
                from ray import serve

                serve.delete(serve.get_replica_context().app_name, _blocking=False)
            raise

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For the policy `replica_range.scale_by_queue`: misses that this replica works on."""
        return {QUEUE: float(self._links.queue)}

    def __del__(self) -> None:
        if (student := self.__dict__.pop("_student", None)) is not None:
            student.close()


class Students:
    """The applications of one task of a server. `prefix`: of their names; no other task and no other server on the cluster has it.

    `mark`: of a further task; empty: the server's first.
    """

    def __init__(self, config: Config, fronts: Sequence[FrontAddress], kind: type | None = None, mark: str = "") -> None:
        self._config, self._fronts, self._kind = config, tuple(fronts), kind
        self.prefix = f"headtail-{os.uname().nodename}-{config.port}{mark and f'_{mark}'}-".lower()

    def start(self) -> None:
        """Join or start Ray and Serve; end what a killed server of this port left there of this task."""
        # A server outlives its cluster's GCS: Ray would end this process 60 s after it, and with it the fronts.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_WITHOUT_GCS_S))
        from ray import serve

        with _STARTING, _quiet():
            cluster.start_cluster()
            serve.start(proxy_location="Disabled", logging_config=_LOGGING)
            for name in serve_applications():
                if name.startswith(self.prefix):
                    serve.delete(name)

    def deploy(self, served: ServedStudent) -> str:
        """Begin to start an application; its name. It runs beside those that are there."""
        from ray import serve

        name = f"{self.prefix}{served.mark}"
        application = student_application(self._config, served, self._fronts, self._kind, self._most_replicas())
        target = serve.RunTarget(target=application, name=name, route_prefix=None, logging_config=_LOGGING)
        with _quiet():
            _ask_serve(lambda: serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False))
        return name

    def _most_replicas(self) -> int:
        """Engines of the largest student of this server: the next one begins with as many, so that a swap under load has room."""
        applications = serve_applications()
        states = [
            part.replica_states for name, app in applications.items() if name.startswith(self.prefix) for part in app.deployments.values()
        ]
        return max((int(state.get("RUNNING", 0)) for state in states), default=0)

    def running(self, name: str) -> bool:
        """Whether an application runs. EngineError when it cannot."""
        state = serve_applications().get(name)
        if state is not None and state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            broken = {part: found.message for part, found in state.deployments.items() if found.status != "HEALTHY" and found.message}
            where, message = next(iter(broken.items()), ("application", state.message))
            fix = "run headtail doctor; or --set realtime_student=false to serve without the student"
            raise cluster.unwrap_error(message, EngineError, "the student did not start", where=f"deployment {where}", fix=fix)
        return state is not None and state.status == "RUNNING"

    def is_there(self, name: str) -> bool:
        """Whether Serve has an application, in whatever state."""
        return name in serve_applications()

    def delete(self, name: str) -> None:
        """End an application."""
        from ray import serve

        with _quiet():
            serve.delete(name)

    def stop(self) -> None:
        """End this server's applications, and Serve itself when no other application is left."""
        from ray import serve

        with _quiet(), contextlib.suppress(Exception):
            for name in serve_applications():
                if name.startswith(self.prefix):
                    serve.delete(name)
            if not serve_applications():
                _shutdown()


def serve_applications() -> dict[str, Any]:
    """The applications on this cluster, by name. EngineError when Ray does not answer."""
    from ray import serve

    return _ask_serve(lambda: dict(serve.status().applications))


def _ask_serve(call: Callable[[], T], turn: threading.Lock = _SERVE, seconds: float = _ANSWER_S) -> T:
    """What a call of Serve gives; it has no time limit of its own. A call that does not end keeps its thread and `turn`."""
    found: concurrent.futures.Future[T] = concurrent.futures.Future()

    def ask() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)
        finally:
            turn.release()

    if turn.acquire(timeout=seconds):
        threading.Thread(target=ask, name="headtail-ask-serve", daemon=True).start()
        concurrent.futures.wait([found], seconds)
    if not found.done():
        what = f"the Ray cluster did not answer for {seconds:g} s: students that run go on, none can be started"
        raise EngineError(what, fix="if it stays so, start the server again: its GCS has died")
    return found.result()


def student_application(
    config: Config, served: ServedStudent, fronts: Sequence[FrontAddress], kind: type | None = None, initial: int = 0
) -> Any:
    """The Serve application of one student. `initial`: replicas to begin with, where the config gives a range."""
    from ray import serve

    from headtail.stages.serve.realtime import Student

    model, bigger = served.model, served.stands_for == ESCALATION
    resources = {"num_cpus": model.cpus, "num_gpus": model.gpus * model.tensor_parallel, "resources": dict(model.resources)}
    with _SERVE:
        deployment = serve.deployment(
            name="escalation" if bigger else "realtime",
            **_replica_options(config.escalation.replicas if bigger else config.realtime_replicas, initial),
            ray_actor_options=resources,
            health_check_period_s=5,
            graceful_shutdown_timeout_s=5,
            max_constructor_retry_count=1,
            user_config={"query": WARM_UP, "connect_s": config.start_timeout_s},
        )(StudentReplica)
    leaves = config.students == "here"
    return deployment.bind(kind or Student, config.root, served, tuple(fronts), config.link_token_file, config.away_s, leaves)


def _replica_options(replicas: int | ReplicaRange, initial: int) -> dict[str, Any]:
    if isinstance(replicas, ReplicaRange):
        return {"autoscaling_config": replicas.serve_config(initial)}
    return {"num_replicas": replicas}


def _shutdown() -> None:
    """End Serve. Asked through its controller without retries: `serve.shutdown()` alone retries the call that ends the
    controller, and Ray prints that as a failure on stdout."""
    import ray
    from ray import serve

    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ValueError):
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=30)
    serve.shutdown()  # forgets the controller


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Serve's own start-up lines off; its errors still show."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
