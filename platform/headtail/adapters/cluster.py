"""The only module that connects to Ray: join the running cluster, or start a small one in this process.

Inside `ray job submit` or with RAY_ADDRESS set, the running cluster is joined; elsewhere a local one is started with
the machine's cores, its dashboard off and its logs quiet. A local one listens on loopback only, and its sockets, logs and token are
this user's alone. `unwrap_error` finds headtail's own error inside Ray's wrapping. Knows nothing of stages.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from headtail.adapters.progress import say
from headtail.core import errors
from headtail.core.errors import EngineError, HeadtailError

# Of the 107 bytes that a socket's path may have, Ray puts up to 66 behind its folder: /session_<time>_<pid>/sockets/plasma_store.1
_FOLDER_BYTES = 41
_END_S = 5.0  # that processes of a cluster get to end by themselves
_folders: list[tuple[int, str]] = []  # (process, folder) of local clusters started here, to be taken away after them


def joins_cluster() -> bool:
    """Whether `start_cluster` joins a running cluster."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def start_cluster(cpus: int | None = None) -> None:
    """Join or start a cluster; does nothing when this process is connected already.

    `cpus`: logical CPUs of a cluster started here; default the cores of this machine, at least 2. EngineError when Ray does
    not start.
    """
    joins = joins_cluster()
    if not joins:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for one machine alone: every port on 127.0.0.1
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process per training that looks for nodes that will go
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on every import that it found no GPU
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray").setLevel(logging.ERROR)
    with _own_sigterm():
        if joins:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            _start_here(cpus or max(2, os.cpu_count() or 2))
    quiet_data()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """After the start inside, the process's own handler of SIGTERM holds again: Ray's prints a C++ stack and aborts. While it starts, Ray
    exits on SIGTERM: here that is Ctrl-C."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _start_here(cpus: int) -> None:
    """A cluster on this machine. Ray gives it 30 s, which a busy machine may exceed: it gets a second chance, then an error."""
    import ray
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False  # where Ray was imported before `start_cluster` could set its switch
    folder = _private_folder()
    for last in (False, True):
        try:
            _private_token()
            with _silence_ray():
                ray.init(
                    address="local",  # not whatever cluster this machine's last `ray start` left behind
                    num_cpus=cpus,
                    include_dashboard=False,
                    _temp_dir=folder,
                    log_to_driver=bool(os.environ.get("HEADTAIL_WORKER_LOGS")),
                    logging_level=logging.ERROR,
                    configure_logging=True,
                    runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}},
                )
            return
        except Exception as error:  # Ray raises plain Exception here
            ray.shutdown()
            if last or "timed out during startup" not in str(error):
                fix = "the machine is too busy, or out of memory, disk (/tmp) or processes: free some and run again; finished rows are kept"
                raise EngineError(f"Ray did not start on this machine: {error}", fix=fix) from error
            say("  Ray did not start within 30 s: the machine is busy; trying once more")


def _private_folder() -> str:
    """A new folder (0700) for Ray's sockets and logs; Ray's own /tmp/ray can be written by every user. Kept when RAY_TMPDIR asks for it."""
    asked = os.environ.get("RAY_TMPDIR", "")
    for place in filter(None, (asked, tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(place)) + len("/ray-12345678/s") <= _FOLDER_BYTES:
            Path(place).mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix="ray-", dir=place)
            if place != asked:
                if not _folders:
                    atexit.register(stop_cluster)
                _folders.append((os.getpid(), folder))
            return f"{folder}/s"  # Ray gives its own folder to all users: this one lies in ours
    raise EngineError("no folder is short enough for Ray's sockets", where="TMPDIR", fix="set RAY_TMPDIR to a folder such as /tmp")


def _private_token() -> None:
    """The token that Ray asks of every client, in a file of this user only (0600). Ray itself would make it readable by all."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        handle, aside = tempfile.mkstemp(dir=path.parent)  # 0600
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was first: its token holds
            os.link(aside, path)
        os.unlink(aside)
    path.chmod(0o600)


@contextlib.contextmanager
def _silence_ray() -> Iterator[None]:
    """Ray's C++ side set to say nothing on stderr, unless RAY_BACKEND_LOG_LEVEL asks for more.

    It calls Ray Data's ordinary actors faulty (ray-project/ray#53727) on every map; and it says on stderr that its level
    was set, hence the detour. What goes wrong is raised as an exception all the same.
    """
    if "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


def quiet_data() -> None:
    """Ray Data's own bars and logs off: our progress says what matters."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60's DataContext sets fields of its own that it calls deprecated
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised too: printed once, by the caller


def stop_cluster() -> None:
    """Leave the cluster; one that this process started ends."""
    import ray

    if ray.is_initialized():
        with _reap(_folders):
            ray.shutdown()
    while _folders and _folders[-1][0] == os.getpid():
        shutil.rmtree(_folders.pop()[1], ignore_errors=True)


@contextlib.contextmanager
def _reap(folders: Sequence[tuple[int, str]]) -> Iterator[None]:
    """After the shutdown inside, no process of a cluster that this process started is left: agents whose GCS is dead wait for it."""
    import psutil

    ours, found = [folder for pid, folder in folders if pid == os.getpid()], []
    for child in psutil.Process().children() if ours else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(folder in argument for argument in child.cmdline() for folder in ours):
                found += [child, *child.children(recursive=True)]
    yield
    for process in psutil.wait_procs(found, _END_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def unwrap_error(error: BaseException | str, kind: type[HeadtailError], what: str, *, where: str = "", fix: str = "") -> HeadtailError:
    """The deliberate error inside what Ray wraps around it, else a `kind` that says `what` and the error's own line.

    Tasks, actors and Train keep the error as an object. Data (in a UserCodeException), the start of an actor and Serve keep
    nothing but the text of its traceback: the error is made again from that.
    """
    found = _find_cause(error, set()) or _parse_traceback(str(error))
    return found or kind(f"{what}: {_line(str(error))}", where=where, fix=fix)


def _find_cause(error: object, seen: set[int]) -> HeadtailError | None:
    """The first HeadtailError among an exception and those that it keeps."""
    if not isinstance(error, BaseException) or id(error) in seen:
        return None
    seen.add(id(error))
    held = (getattr(error, "cause", None), *getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None))
    for inner in (*held, error.__cause__):
        if found := _find_cause(inner, seen):
            return found
    return error if isinstance(error, HeadtailError) else None  # last: Ray's RayTaskError(ConfigError) is one too, around the real one


_KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HeadtailError)}
_SAID = re.compile(
    rf"^{re.escape(errors.__name__)}\.({'|'.join(_KINDS)}): (.+?)(?=^\s*$|\Z)", re.MULTILINE | re.DOTALL
)  # as a traceback ends
_RAISED = re.compile(r"^([\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)


def _parse_traceback(text: str) -> HeadtailError | None:
    """The last HeadtailError whose text a traceback holds, made again from its lines: see HeadtailError.__str__."""
    match = next(reversed(list(_SAID.finditer(text))), None)
    if match is None:
        return None
    what, *parts = re.split(r"^  (where|value|do): +", match[2].rstrip(), flags=re.MULTILINE)
    said = {name: part.rstrip("\n") for name, part in zip(parts[::2], parts[1::2], strict=True)}
    return _KINDS[match[1]](what.rstrip("\n"), where=said.get("where", ""), value=said.get("value"), fix=said.get("do", ""))


def _line(text: str) -> str:
    """The line that says what was raised, out of a traceback and what Ray writes around it."""
    lines = [line for line in _RAISED.findall(text) if not line.startswith("ray.exceptions.")]
    return str((lines or text.strip().splitlines() or ["no words"])[-1]).strip()[:500]
