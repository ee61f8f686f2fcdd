"""Serve a release: FastAPI on Ray Serve: first the cache, then the realtime student, then the fallback.

In: a store with a release. Out: a Server (its URL, `stop`). A cache hit is answered in the ingress replica itself;
only a miss crosses a handle. Known faults (no release, port taken, no model) are errors before Ray starts.
Knows nothing of how releases are made.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from headtail.adapters import cluster
from headtail.adapters.progress import say
from headtail.adapters.proxies import may_proxy
from headtail.adapters.storage import Storage, open_storage
from headtail.cache import read_manifest
from headtail.core.config import build_config
from headtail.core.errors import ConfigError, EngineError
from headtail.engines import ENGINES, ModelConfig
from headtail.engines.device import resolve_dtype
from headtail.engines.models import find_model
from headtail.releases import release as releases
from headtail.stages.serve.config import Config

APP = "headtail"
INGRESS_CPUS = 0.1  # a lookup takes microseconds: the ingress must not take a whole core from the student
TELL_EVERY_S = 10.0


class ServedStudent(NamedTuple):
    """The model that answers misses, and the digest of its weights where the deployment is started."""

    model: ModelConfig
    digest: str


class Server:
    """A running server. Use it as a context manager, or call `stop`."""

    def __init__(self, config: Config, release: str, owns_ray: bool) -> None:
        self.config, self.release, self._owns_ray = config, release, owns_ray
        host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
        self.url = f"http://{host}:{config.port}"
        self._stopped = False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering; a Ray cluster that `start_cluster` began ends too. Safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        _shutdown()
        if self._owns_ray:
            cluster.stop_cluster()


def _shutdown() -> None:
    """End Serve. Asked through its controller without retries: `serve.shutdown()` alone retries the call that ends the
    controller, and Ray prints that as a failure on stdout."""
    import ray
    from ray import serve

    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ValueError):
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=30)
    with _quiet():
        serve.shutdown()  # forgets the controller


def start_server(config: Config, student: type | None = None) -> Server:
    """Start serving and wait until it answers. Errors name the port, the release or the model before anything heavy starts.

    `student`: a class to run instead of `realtime.Student`, for tests.
    """
    check_port(config)
    config, release, chosen = _resolve_release(config)
    import ray
    from ray import serve

    owns_ray = not ray.is_initialized()
    cluster.start_cluster()
    _refuse_second()
    server = Server(config, release.id, owns_ray)
    try:
        with _quiet():
            options = {
                "host": config.host,
                "port": config.port,
                "request_timeout_s": config.realtime_timeout_ms / 1000 + 10,
                "keep_alive_timeout_s": 75,
            }
            serve.start(http_options=options, logging_config=_LOGGING)
            target = serve.RunTarget(
                target=application(config, release, chosen, student), name=APP, route_prefix="/", logging_config=_LOGGING
            )
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            _wait(config, server, chosen.model if chosen else None)
    except BaseException:
        server.stop()
        raise
    return server


def run_forever(config: Config) -> None:
    """Serve until Ctrl-C or SIGTERM. While it starts, both interrupt; what was started is ended in any case."""
    stop = threading.Event()
    try:
        with start_server(config) as server:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            say(f"serving release {server.release} at {server.url}  (try-it page; API docs at {server.url}/docs)")
            say(f"ask it:   curl '{server.url}/v1/answer?query=pizza+near+me'")
            say("Ctrl-C ends it")
            stop.wait()
            say("stopping ...")
    except KeyboardInterrupt:
        say("interrupted while starting")


def application(config: Config, release: releases.Release, served: ServedStudent | None, student: type | None = None) -> Any:
    """The Serve application: the ingress, and the student behind it when there is one. `student`: another class, for tests."""
    from ray import serve

    from headtail.stages.serve.ingress import Ingress
    from headtail.stages.serve.realtime import Student

    realtime = None
    if served is not None:
        model = served.model
        kind = serve.deployment(
            name="realtime",
            num_replicas=config.realtime_replicas,
            max_ongoing_requests=config.max_ongoing_requests,
            max_queued_requests=config.max_queued_requests,
            ray_actor_options={
                "num_cpus": model.cpus,
                "num_gpus": model.gpus * model.tensor_parallel,
                "resources": dict(model.resources),
            },
            health_check_period_s=5,
            graceful_shutdown_timeout_s=5,
            max_constructor_retry_count=1,
            user_config={"query": "warm up"},
        )(student or Student)
        realtime = kind.bind(model, config.root, releases.open_task(release), release.student, served.digest)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        graceful_shutdown_timeout_s=5,
        max_surge_percent=100,  # the new replica answers before the old one leaves
    )(serve.ingress()(Ingress))
    return ingress.bind(config, realtime, served.model.model if served else "", release.student if config.realtime_student else None)


def from_args(args: dict[str, Any]) -> Any:
    """The application from the `args` of a Serve config file (import_path: headtail.stages.serve:from_args): fields of Config."""
    return application(*_resolve_release(build_config(Config, args, where="args of the Serve config")))


def _resolve_release(config: Config) -> tuple[Config, releases.Release, ServedStudent | None]:
    """`config` with an absolute root (replicas have a working directory of their own), its release and the model that runs live."""
    store = open_storage(config.root)
    config = config.model_copy(update={"root": store.root})
    release = releases.load_release(store, config.release)
    read_manifest(store, release.snapshot)
    return config, release, _student(config, store, release)


_LOGGING: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}


def _student(config: Config, store: Storage, release: releases.Release) -> ServedStudent | None:
    """The realtime student, or None when it is switched off or the release has no student. A missing model is an error here."""
    if not config.realtime_student:
        return None
    model = resolve_dtype(config.model.model_copy(update={"model": config.model.model or release.student}))  # once for all replicas
    if not model.model:
        say("serve        this release has no student: misses get the task's fallback")
        return None
    if not model.traits.in_process:
        here = ", ".join(name for name, traits in ENGINES.items() if traits.in_process)
        fix = f"set model.engine to one of {here}, or realtime_student=false"
        raise ConfigError("the realtime student must run in the server's own processes", where="model.engine", value=model.engine, fix=fix)
    found = find_model(model, store, fetch=False)  # each replica fetches for itself
    found.io_format.check(releases.open_task(release))
    folder = Path(model.model).expanduser()
    return ServedStudent(model.model_copy(update={"model": str(folder.resolve())}) if folder.is_dir() else model, found.digest)


def check_port(config: Config) -> None:
    """ConfigError when the port cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on port {config.port}: {error.strerror}",
                where="port",
                value=f"{config.host}:{config.port}",
                fix=f"stop what uses it (find it with: ss -ltnp 'sport = :{config.port}'), or choose another: --set port={config.port + 1}",
            ) from None


def _refuse_second() -> None:
    """Serve's HTTP options belong to the cluster: a second server on it would silently listen where the first does."""
    from ray import serve

    running = serve.status()
    if running.applications or running.proxies:
        names = ", ".join(running.applications) or "no application"
        raise ConfigError(
            "Ray Serve already runs in this Ray cluster",
            where="cluster",
            value=names,
            fix="end it (serve shutdown), or use another cluster",
        )


def _wait(config: Config, server: Server, model: ModelConfig | None) -> None:
    """Wait until the application runs and answers; print every few seconds what it waits for."""
    import httpx
    from ray import serve

    began = told = time.monotonic()
    while True:
        state = serve.status().applications.get(APP)
        if state is not None and state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            broken = {name: part.message for name, part in state.deployments.items() if part.status != "HEALTHY" and part.message}
            where, message = next(iter(broken.items()), ("application", state.message))
            fix = "run headtail doctor; or --set realtime_student=false to serve without the student"
            raise cluster.unwrap_error(message, EngineError, "the server did not start", where=f"deployment {where}", fix=fix)
        if state is not None and state.status == "RUNNING":
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{server.url}/readyz", timeout=5, trust_env=may_proxy(server.url)).status_code == 200:
                    return
        now = time.monotonic()
        if now - began > config.start_timeout_s:
            raise EngineError(
                f"the server was not ready after {config.start_timeout_s:.0f} s",
                value=str(state)[:500],
                fix="raise start_timeout_s, or check free CPUs and GPUs with: ray status",
            )
        if now - told > TELL_EVERY_S:
            told = now
            waiting = f"the student {model.model}" if model else "the ingress"
            say(f"serve        waiting for {waiting}: {now - began:.0f} s")
        time.sleep(0.2)


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
