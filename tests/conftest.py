"""Fixtures shared by all tests. What is slow to start (Ray, the moto server, engines) is started once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings

from headtail.adapters import charts
from headtail.adapters.storage import LocalStorage, Storage, open_storage, write_json, write_table
from headtail.batch import worker
from headtail.core.evidence import JobFigures
from headtail.core.receipt import FileRef, Receipt
from headtail.core.task import Task, load_task
from headtail.stages.precompute.result import AnsweringModel
from headtail.stages.precompute.result import Result as PrecomputeResult
from here import answer_here, train_here  # noqa: F401  # fixtures
from moto_s3 import serve_s3
from null_jobs import MakeJob, maker
from ports import free_port
from ray_jobs import head  # noqa: F401  # a fixture
from timescale import SCALE, limit

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# An example has no time limit: pytest's own ends a test that hangs, and a slow machine breaks any other.
settings.register_profile("headtail", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("headtail")

EXAMPLES = Path(__file__).parent.parent / "platform" / "headtail" / "examples"


def pytest_configure(config: pytest.Config) -> None:
    """Workers that test at the same time share the cores, and threads that wait for one another spin: one each, of NumPy and torch. NumPy
    reads this when it is imported, so it is set before the workers start."""
    if (config.getoption("numprocesses", None) or 0) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that two workers end at about the same time. Limits fit a slow machine: see timescale.py."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable: the order within a file stays
    for item in items:
        if starts_moto(item):
            item.add_marker("slow")
    if SCALE == 1:
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker else config.getini("timeout")
        item.add_marker(pytest.mark.timeout(limit(float(seconds))), append=False)


def starts_moto(item: pytest.Item) -> bool:
    """Whether a test talks to the server that stands in for S3: some 10 ms a call, hundreds of calls."""
    parameters = getattr(item, "callspec", None)
    return "_moto" in getattr(item, "fixturenames", ()) or (parameters is not None and "s3" in parameters.params.values())


@pytest.fixture(autouse=True)
def not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in this process does not collect and freeze what all tests before it left: 0.2 s each time, and the rest would stay."""
    monkeypatch.setattr(worker, "gc", SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None))


@pytest.fixture(autouse=True)
def not_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test's own process writes need not outlive a loss of power, and to wait for the disk takes a tenth of the time of stages."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of stages are blank: for simulations, which run stages hundreds of times (0.15 s a figure)."""
    monkeypatch.setattr(charts, "svg", lambda figure: "<svg></svg>")


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A fresh store's root, with MLflow inside it."""
    return str(tmp_path / "store")


@pytest.fixture
def store(root: str) -> Storage:
    """A fresh local store."""
    made = open_storage(root)
    assert isinstance(made, LocalStorage)
    return made


@pytest.fixture(scope="session")
def segmentation() -> Task:
    return load_task("query_segmentation")


@pytest.fixture(params=["local", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store's root, once on local disk and once on S3, for which moto's server stands in."""
    return str(request.getfixturevalue("s3_root")) if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def make_job(any_root: str, segmentation: Task) -> MakeJob:
    """A job over one or more tables of queries, with the null engine, on either kind of store; see null_jobs."""
    return maker(any_root, segmentation)


@pytest.fixture
def make_local_job(root: str, segmentation: Task) -> MakeJob:
    """The same on local disk, for tests that damage files."""
    return maker(root, segmentation)


@pytest.fixture(scope="session")
def intent() -> Task:
    return load_task("query_intent")


@pytest.fixture(scope="session")
def teacher_path() -> Path:
    """The shipped reference teacher, a Hugging Face folder."""
    return EXAMPLES / "models" / "teacher"


@pytest.fixture(scope="session")
def cluster(_moto: str) -> Iterator[None]:
    """A real Ray cluster for the whole test session; logical CPUs exceed the cores so that small actors fit. Its workers know of moto."""
    from headtail.adapters.cluster import start_cluster, stop_cluster

    start_cluster(cpus=4)
    yield
    stop_cluster()


def answered_by(name: str = "model", digest: str = "digest", source: str = "teacher", **fields: Any) -> PrecomputeResult:
    """The result of a precompute by a model of this name."""
    return PrecomputeResult(source=source, model=AnsweringModel(name=name, digest=digest), **fields)


def figures_of(**known: float) -> JobFigures:
    """Figures of a job of which only `known` matters; money is null unless it is known."""
    unset = {name: 0.0 for name, field in JobFigures.model_fields.items() if field.is_required()}
    return JobFigures.model_validate({**unset, **known})


def keep(store: Storage, stage: str, mark: str, tables: Mapping[str, pa.Table], **fields: Any) -> Receipt[Any]:
    """A receipt made by hand, as the stage itself would leave it."""
    path = f"{stage}/{mark}"
    outputs: dict[str, FileRef] = {name: write_table(store, f"{path}/{name}.parquet", table) for name, table in tables.items()}
    made = Receipt(
        stage=stage, fingerprint=mark * 2, path=path, started="2030-01-01T00:00:00+00:00", seconds=1.0, outputs=outputs, **fields
    )
    write_json(store, f"{path}/receipt.json", made.model_dump(mode="json"))
    store.replace(f"{stage}/LATEST", path.encode())
    return made


@pytest.fixture(scope="session")
def _moto() -> Iterator[str]:
    """moto's server stands in for S3: see moto_s3."""
    port = free_port()
    server = serve_s3(port)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    yield f"http://127.0.0.1:{port}"
    server.shutdown()


@pytest.fixture
def s3_root(_moto: str, request: pytest.FixtureRequest) -> str:
    """A fresh bucket as a store's root."""
    import boto3

    bucket = f"headtail-{abs(hash(request.node.nodeid)) % 10**10}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/store"
