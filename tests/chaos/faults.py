"""Faults put into a process from outside, so that production code has no hooks for them.

In: a plan, the JSON file that $HEADTAIL_CHAOS names. Out: a process that dies at the commits the plan names, or whose write
fails there, and a log with a line for every row its engine was asked and gave. Ray's processes get it through
site/sitecustomize.py, forked ones call `install`. Knows nothing of how headtail uses its store.

A commit is a call of Storage.replace, create or put_file, or the sweep of finished work. Commits are numbered from 1 over
all processes that share a plan. What can be done at one:

    kill:before   SIGKILL to itself before anything is written
    kill:inside   on disk: written aside, not yet renamed; on S3: done by the server, the reply never seen; sweep: half of it done
    kill:after    SIGKILL once the call is over
    fail:inside   on disk: no space left (ENOSPC) while writing
    fail:after    the write is done, then fails once: EIO on disk; on S3 a broken connection, after which headtail asks again
    reset         on S3: the connection breaks before anything is written
    409, 429, 503 on S3: this answer, and nothing is written
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

VARIABLE = "HEADTAIL_CHAOS"
WIDTH = 200  # bytes of a line in the list of commits
_OPS = ("replace", "create", "put_file")
LATER = ("reset", "409", "429", "503")  # what S3 may do that means "again, later"

_plan: dict[str, Any] = {}
_log = -1
_armed = ""  # the act that is to happen inside the write now going on
_renamed = False


def hook() -> None:
    """Install the plan's faults in modules of headtail as they are imported."""
    _read_plan()
    sys.meta_path.insert(0, _Finder())


def install() -> None:
    """Install the plan's faults in modules that are imported already, and in those to come."""
    hook()
    for name, patch in PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])


def _read_plan() -> None:
    global _plan, _log
    with open(os.environ[VARIABLE], encoding="utf-8") as file:
        _plan = json.load(file)
    _log = os.open(_plan["events"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def tell(kind: str, what: str = "") -> None:
    """A line of the log: time, pid, kind (s started, a asked, d done, e ended in an error, k killed, f failed), what."""
    os.write(_log, f"{time.time():.6f} {os.getpid()} {kind} {what}\n".encode())


def mark(text: str) -> str:
    """Short name of a row's prompt in the log."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _die(what: str) -> None:
    tell("k", what)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


# --- commits


def _number(op: str, path: str) -> int:
    """The number of the commit that is about to happen, over all processes that share the plan."""
    line = f"{os.getpid()} {op} {path}"[: WIDTH - 1].ljust(WIDTH - 1) + "\n"
    handle = os.open(_plan["commits"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, line.encode("utf-8", "replace")[:WIDTH])
        return os.fstat(handle).st_size // WIDTH
    finally:
        os.close(handle)


def _committed(op: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def commit(store: Any, *args: Any) -> Any:
        path = str(args[1] if op == "put_file" else args[0])
        number = _number(op, path)
        act = _plan["at"].get(str(number), "")
        return _struck(act, f"{number} {op} {path}", lambda: plain(store, *args)) if act else plain(store, *args)

    return commit


def _struck(act: str, what: str, write: Callable[[], Any]) -> Any:
    global _armed, _renamed
    if act == "kill:before":
        _die(f"{act} {what}")
    _armed, _renamed = f"{act} {what}", False
    unplant = _plant_in_boto()
    try:
        made = write()
    finally:
        unplant()
        left, _armed = _armed, ""
    if left and act.startswith("kill"):
        _die(f"{act} {what}")
    return made


def _fire() -> str:
    """The act that was armed, disarmed."""
    global _armed
    act, _armed = _armed, ""
    return act


def _patch_os() -> None:
    """The steps of a write on disk: fsync of the data, replace or link, fsync of the folder."""

    def renaming(plain: Callable[..., Any]) -> Callable[..., Any]:
        def rename(*args: Any, **options: Any) -> Any:
            global _renamed
            if _armed.startswith("kill:inside"):
                _die(_fire())
            made = plain(*args, **options)
            _renamed = True
            return made

        return rename

    def fsync(handle: int) -> None:
        if _armed.startswith("fail:inside") and not _renamed:
            tell("f", _fire())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if _armed.startswith("fail:after") and _renamed:
            tell("f", _fire())
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain_fsync(handle)

    plain_fsync = os.fsync
    os.replace, os.link, os.fsync = renaming(os.replace), renaming(os.link), fsync  # type: ignore[assignment]


def _plant_in_boto() -> Callable[[], None]:
    """While a fault is armed: what becomes of the next PUT or POST, or of the reply to it."""
    if "botocore.httpsession" not in sys.modules:
        return lambda: None
    from botocore.exceptions import ConnectionClosedError
    from botocore.httpsession import URLLib3Session

    plain = URLLib3Session.send

    def send(session: Any, request: Any) -> Any:
        writes = request.method in ("PUT", "POST") and "/.headtail/" not in request.url  # the store's own probe is no commit
        if writes and _armed.startswith(LATER):
            act = _fire()
            tell("f", act)
            if act.startswith("reset"):
                raise ConnectionClosedError(endpoint_url=request.url)
            return _answer(request.url, int(act[:3]))
        reply = plain(session, request)
        if writes and _armed.startswith(("kill:inside", "fail:after")):
            act = _fire()
            if act.startswith("kill"):
                _die(act)
            tell("f", act)
            raise ConnectionClosedError(endpoint_url=request.url)
        return reply

    URLLib3Session.send = send

    def unplant() -> None:
        URLLib3Session.send = plain

    return unplant


def _answer(url: str, status: int) -> Any:
    """What a server that wrote nothing says."""
    from botocore.awsrequest import AWSResponse

    class Raw:
        def stream(self) -> list[bytes]:
            return [b"<Error><Code>Later</Code><Message>on purpose</Message></Error>"]

    return AWSResponse(url, status, {}, Raw())


def _patch_storage(module: Any) -> None:
    for kind in (module.LocalStorage, module.S3Storage):
        for op in _OPS:
            setattr(kind, op, _committed(op, getattr(kind, op)))
    _patch_os()


def _patch_sweep(module: Any) -> None:
    plain = module.remove_work_files

    def remove_work_files(store: Any, job: Any) -> None:
        path = job if isinstance(job, str) else str(job.path)
        number = _number("sweep", path)
        act = _plan["at"].get(str(number), "")
        if act == "kill:inside":
            _half_swept(store, path)
        if act in ("kill:before", "kill:inside"):
            _die(f"{act} {number} sweep {path}")
        plain(store, job)
        if act == "kill:after":
            _die(f"{act} {number} sweep {path}")

    module.remove_work_files = remove_work_files


def _half_swept(store: Any, path: str) -> None:
    """Some files of the work that is about to be removed: journals first, each kind in any order."""
    import pyarrow.fs as pafs

    folder = store.full(f"{path}/work/shards")
    found = store.filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    rng = random.Random(_plan["seed"])
    files = sorted(info.path for info in found if info.type == pafs.FileType.File)
    rng.shuffle(files)
    files.sort(key=lambda path: not path.endswith("/journal.json"))
    for file in files[: rng.randint(0, len(files))]:
        store.filesystem.delete_file(file)


# --- rows


def _patch_engine(module: ModuleType) -> None:
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "generate") and hasattr(kind, "facts"):
            kind.generate = _watched(kind.generate)
    for name, seconds in _plan.get("pace", {}).items():
        if hasattr(module, name):
            setattr(module, name, seconds)


def _watched(plain: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """`generate` with a line in the log for each row that goes in and comes out."""

    def generate(engine: Any, requests: Iterable[Any]) -> Iterator[Any]:
        marks: dict[int, str] = {}

        def asked() -> Iterator[Any]:
            for request in requests:
                marks[request.id] = mark(_text(request.messages))
                tell("a", marks[request.id])
                yield request

        tell("s")
        for completion in plain(engine, asked()):
            tell("e" if completion.error else "d", marks.pop(completion.id))
            yield completion

    return generate


def _text(messages: Sequence[dict[str, str]]) -> str:
    return messages[-1]["content"]


def _patch_worker(module: ModuleType) -> None:
    for name, seconds in _plan.get("pace", {}).items():
        if hasattr(module, name):
            setattr(module, name, seconds)


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "headtail.adapters.storage": _patch_storage,
    "headtail.stages.precompute.stage": _patch_sweep,
    "headtail.engines.null": _patch_engine,
    "headtail.engines.openai": _patch_engine,
    "headtail.engines.vllm": _patch_engine,
    "headtail.batch.worker": _patch_worker,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets a module be found as always, and patches it once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Patching(spec.loader, PATCHES[name])
        return spec


class _Patching(importlib.abc.Loader):
    def __init__(self, plain: Any, patch: Callable[[ModuleType], None]) -> None:
        self.plain, self.patch = plain, patch

    def create_module(self, spec: Any) -> ModuleType | None:
        made: ModuleType | None = self.plain.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.plain.exec_module(module)
        self.patch(module)
