"""Serve a release: front processes on one port answer hits from the cache and hand misses to students on Ray Serve.

In: a store with a release, for each task. Out: a Server (its URLs, `stop`). Known faults (no release, port taken, no model) are errors
before anything heavy starts. Ray is started only where a student is served. Knows nothing of how releases are made.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage
from headtail.cache import read_manifest
from headtail.core.config import build_config
from headtail.core.errors import ConfigError, HeadtailError
from headtail.releases import release as releases
from headtail.stages.serve.api_keys import read_keys
from headtail.stages.serve.config import Config
from headtail.stages.serve.shadow import check_shadow
from headtail.stages.serve.students import ServedStudent, resolve_bigger, resolve_student
from headtail.stages.serve.supervisor import Supervisor, TaskToServe


class Server:
    """A running server. Use it as a context manager, or call `stop`."""

    def __init__(self, config: Config, release: str, further: Mapping[str, str], supervisor: Supervisor) -> None:
        """`release`: id of the first task's; `further`: of the further tasks' by name."""
        self.config, self.release, self.further, self._supervisor = config, release, further, supervisor
        self.url, self.admin_url = config.url, config.admin_url

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer what is in flight, then end; a Ray cluster that was started for it ends too. Safe to call twice."""
        self._supervisor.stop()


def start_server(config: Config, student: type | None = None) -> Server:
    """Start serving and wait until it answers. Errors name the port, the release or the model before anything heavy starts.

    `student`: a class to run instead of `realtime.Student`, for tests.
    """
    check_port(config)
    check_keys(config)
    first = _resolve_task(config)
    further = {}
    for name in config.tasks:
        try:
            further[name] = _resolve_task(config.of_task(name), f"task {name}: ")
        except HeadtailError as error:
            error.where = f"tasks.{name}: {error.where}"
            raise
    check_tasks(first, further)
    supervisor = Supervisor(first, further, student)
    try:
        supervisor.start()
    except BaseException:
        supervisor.stop()
        raise
    return Server(first.config, first.release.id, {name: task.release.id for name, task in further.items()}, supervisor)


def run_forever(config: Config) -> None:
    """Serve until Ctrl-C or SIGTERM. While it starts, both interrupt; what was started is ended in any case."""
    stop = threading.Event()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with start_server(config) as server:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            say(f"serving release {server.release} at {server.url}")
            say(f"ask it:   curl '{server.url}/v1/answer?query=pizza+near+me'")
            for name, release in server.further.items():
                say(f"serving task {name}, release {release}, at {server.url}/tasks/{name}")
            say(f"try-it page, API docs (/docs), Prometheus (/metrics): {server.admin_url}")
            say("Ctrl-C ends it")
            stop.wait()
            say("stopping: requests in flight are answered first ...")
    except KeyboardInterrupt:
        say("interrupted while starting")


def from_args(args: dict[str, Any]) -> Any:
    """The students as a Serve application, from the `args` of a Serve config file: fields of Config, of a server whose fronts run
    elsewhere (`students: elsewhere`) and are reached at `link_address`."""
    config, release = _resolve_args(args)
    chosen = resolve_student(config, open_storage(config.root), release)
    if chosen is None:
        raise ConfigError("this release has no student to serve", where="release", value=release.id, fix="promote one that has")
    return _application(config, chosen)


def escalation_from_args(args: dict[str, Any]) -> Any:
    """The bigger model as a Serve application of its own, from the same `args` as `from_args`."""
    config, release = _resolve_args(args)
    chosen = resolve_bigger(config, open_storage(config.root), release)
    if chosen is None:
        what, fix = "there is no bigger model to serve", "set it, or leave this application out"
        raise ConfigError(what, where="escalation.model.model", value=config.escalation.model.model, fix=fix)
    return _application(config, chosen)


def _resolve_args(args: dict[str, Any]) -> tuple[Config, releases.Release]:
    config = build_config(Config, args, where="args of the Serve config")
    if config.tasks:
        fix = "leave tasks out, and give each further task an application of its own: its root as root, its first port as link_port"
        raise ConfigError("an application has the students of one task", where="tasks", value=", ".join(config.tasks), fix=fix)
    return _resolve_release(config)


def _application(config: Config, chosen: ServedStudent) -> Any:
    from headtail.stages.serve.student_link import FrontAddress
    from headtail.stages.serve.students import student_application

    fronts = [FrontAddress("", config.link_address, config.link_port + row) for row in range(config.fronts)]
    return student_application(config, chosen, fronts)


def _resolve_task(config: Config, shown: str = "") -> TaskToServe:
    """What is served of a task. `shown`: before what is said of it."""
    check_shadow(config.shadow)
    config, release = _resolve_release(config)
    check_escalation(config, release)
    if config.students == "here" and config.realtime_student and resolve_student(config, open_storage(config.root), release) is None:
        say(f"serve        {shown}this release has no student: misses get the task's fallback")
    return TaskToServe(config, release)


def _resolve_release(config: Config) -> tuple[Config, releases.Release]:
    """`config` with an absolute root (processes may have a working directory of their own), and its release."""
    store = open_storage(config.root)
    config = config.model_copy(update={"root": store.root})
    release = releases.load_release(store, config.release)
    read_manifest(store, release.snapshot)
    return config, release


def check_tasks(first: TaskToServe, further: Mapping[str, TaskToServe]) -> None:
    """ConfigError when two tasks would have one name, one store, or one port of the students' link."""
    if first.release.task in further:
        what, fix = "the first task has this name", "name the task otherwise; its name here need not be that of its task.yaml"
        raise ConfigError(what, where=f"tasks.{first.release.task}", value=first.release.task, fix=fix)
    roots, ports = {first.config.root: "root"}, dict[int, str]()
    for name, task in further.items():
        if (other := roots.setdefault(task.config.root, f"tasks.{name}.root")) != f"tasks.{name}.root":
            fix = "each task has a store of its own: CURRENT, the request log and a canary are the store's"
            raise ConfigError(f"two tasks have one store: {other} is the same", where=f"tasks.{name}.root", value=task.config.root, fix=fix)
    for name, task in {"": first, **further}.items() if first.config.link_host else ():
        begin, field = task.config.link_port, f"tasks.{name}.link_port" if name else "link_port"
        for port in range(begin, begin + task.config.fronts):
            if port > 65535 or port in ports:
                taken = f"{ports[port]} has it" if port in ports else "there is none above 65535"
                fix = f"each task takes {task.config.fronts} ports, one per front process, from its link_port on"
                raise ConfigError(f"port {port} cannot be listened on: {taken}", where=field, value=begin, fix=fix)
            ports[port] = field


def check_keys(config: Config) -> None:
    """ConfigError when the file of API keys cannot be used, or is missing where admin calls need one."""
    if config.admin_calls and not config.api_keys:
        fix = "--set api_keys=FILE; headtail keys add NAME --file FILE --scopes admin"
        raise ConfigError("admin calls need API keys", where="api_keys", value=config.api_keys, fix=fix)
    if config.api_keys:
        read_keys(Path(config.api_keys).expanduser())


def check_escalation(config: Config, release: releases.Release) -> None:
    """ConfigError when a bigger model is named and nothing says when it is to be asked."""
    known, bigger = release.calibration, config.escalation
    if (
        not (bigger.enabled and config.realtime_student)
        or bigger.threshold is not None
        or (known is not None and known.threshold is not None)
    ):
        return
    fix = "publish with a calibration that promises something (docs/escalation.md), or set escalation.threshold"
    raise ConfigError("this release has no threshold for its student's confidence", where="escalation", value=release.id, fix=fix)


def check_port(config: Config) -> None:
    """ConfigError when a port cannot be listened on, or when both are the same."""
    if config.port == config.admin:
        fix = "choose another admin_port; 0 is the one after port"
        raise ConfigError("the pages cannot have the port of the API", where="admin_port", value=config.admin_port, fix=fix)
    for field, host, port in (("port", config.host, config.port), ("admin_port", config.admin_host, config.admin)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on port {port}: {error.strerror}",
                    where=field,
                    value=f"{host}:{port}",
                    fix=f"stop what uses it (find it with: ss -ltnp 'sport = :{port}'), or choose another: --set {field}={port + 1}",
                ) from None
