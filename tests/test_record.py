"""Whatever lies where a record of a store is read: it is read, or one error names the file and what to do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from headtail.adapters import append_log
from headtail.adapters.storage import Storage, open_storage, read_json, read_record
from headtail.adapters.storage.receipts import load_receipt
from headtail.batch import catalog
from headtail.batch.catalog import CatalogEntry
from headtail.batch.job import Journal, ShardReceipt
from headtail.batch.lease import Lease
from headtail.batch.prepare import InputManifest as Parts
from headtail.batch.worker import Starts
from headtail.cache.manifest import LOG, PublishStart, SnapshotManifest, manifest_path, read_manifest
from headtail.core import record
from headtail.core.config import Config
from headtail.core.errors import ConfigError, HeadtailError, StorageError
from headtail.core.evidence import Evidence
from headtail.core.io_format import parse_format as parse_form
from headtail.core.receipt import Receipt, StageResult
from headtail.core.task import Task
from headtail.engines.encoder import LABELS, read_scheme
from headtail.releases import release
from headtail.releases.look import Look
from headtail.releases.release import Move, Release
from headtail.releases.seal import Seal
from headtail.review.log import DecisionLog
from headtail.stages.distill.checkpoints import Marker
from headtail.stages.distill.launch import StoredBase
from headtail.stages.distill.run_record import TrainedRun
from headtail.stages.precompute.dry_run.estimate import Probe

KINDS: list[type[Config]] = [
    *(
        Receipt,
        Release,
        Move,
        SnapshotManifest,
        PublishStart,
        CatalogEntry,
        Parts,
        Journal,
        ShardReceipt,
        Probe,
        Lease,
        Starts,
        Marker,
        StoredBase,
        TrainedRun,
        Look,
        Seal,
        Evidence,
    )
]
FILE = {"path": "plan/ab/head.parquet", "bytes": 1, "sha256": "0", "rows": 1}
RECEIPT = {
    "format": 3,
    "stage": "plan",
    "fingerprint": "ab",
    "path": "plan/ab",
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "rows": {"in": 1},
    "outputs": {"head": FILE},
    "result": {"x": [1, None]},
}
MANIFEST = {
    "id": "ab",
    "task": "t",
    "task_fingerprint": "cd",
    "rows": 1,
    "rows_by_source": {"teacher": 1},
    "lineage": ["precompute/ab"],
    "content": "ef",
    "files": {"lmdb": {**FILE, "path": "snapshots/ab/lmdb/data.mdb"}},
    "created": "2026-01-01T00:00:00+00:00",
}
DECISION = {
    "version": 1,
    "source": "page",
    "queue": "",
    "decisions": [
        {
            "query_key": "ab",
            "query": "q",
            "verdict": "accept",
            "answer": None,
            "before": None,
            "answer_key": None,
            "who": "a",
            "at": "2026-01-01T00:00:00.000+00:00",
            "why": "",
        }
    ],
}
DEEP = b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500
BROKEN = [b"", b"[]", b'"x"', b"null", b"[[1]]", b"7", b"{", b"\xff", b'{"a": "\\ud800"}', b'{"\\ud800": 1}', b"9" * 5000, *DEEP]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def told(error: HeadtailError, file: str) -> None:
    assert file in error.where
    assert error.fix


def places(value: Any) -> list[list[Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *rest] for key, inner in items for rest in places(inner))]


@st.composite
def changed(draw: st.DrawFn, plain: dict[str, Any]) -> Any:
    """`plain` with one value in it, or all of it, replaced by any JSON value."""
    path: list[Any] = ["all", *draw(st.sampled_from(places(plain)))]
    found: Any = {"all": copy.deepcopy(plain)}
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = draw(values)
    return found["all"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=values.map(json.dumps).map(str.encode) | st.sampled_from(BROKEN) | st.binary(max_size=8))
def test_any_bytes_are_a_record_or_one_error(kind: type[Config], data: bytes) -> None:
    try:
        assert isinstance(record.parse_record(kind, data, "a/file.json"), kind)
    except StorageError as error:
        told(error, "a/file.json")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return open_storage(str(tmp_path_factory.mktemp("records")))


READERS: dict[str, tuple[dict[str, Any], Callable[[Storage], object]]] = {
    "plan/ab/receipt.json": (RECEIPT, lambda store: load_receipt(store, "plan", "ab")),
    manifest_path("ab"): (MANIFEST, lambda store: read_manifest(store, "ab")),
    "releases/ab.json": ({"id": "ab"}, lambda store: release.load_release(store, "ab")),
    append_log.entry_path(release.MOVES, 1): ({"release": "ab", "action": "promote", "at": "x"}, release.move_history),
    append_log.entry_path(catalog.FOLDER, 1): ({"path": "precompute/ab", "task": "t", "settings": "x"}, catalog.catalog_entries),
    append_log.entry_path(LOG, 1): (
        {"snapshot": "ab", "at": "2026-01-01T00:00:00+00:00"},
        lambda s: list(append_log.read_entry_records(s, PublishStart, LOG)),
    ),
    append_log.entry_path("reviews/t", 1): (DECISION, lambda store: DecisionLog(store, "t").current_decisions()),
}


@pytest.mark.parametrize("path", READERS)
@given(data=st.data())
def test_every_reader_of_a_store_takes_it_or_names_it(kept: Storage, path: str, data: st.DataObject) -> None:
    plain, read = READERS[path]
    kept.replace(path, data.draw(changed(plain).map(json.dumps).map(str.encode) | st.sampled_from(BROKEN)))
    try:
        read(kept)
    except HeadtailError as error:
        told(error, path.removesuffix("/receipt.json"))


@pytest.mark.parametrize("data", BROKEN)
def test_what_is_no_object_is_told_with_the_file_and_what_to_do(store: Storage, data: bytes) -> None:
    store.replace("a/b.json", data)
    for read in (lambda: read_json(store, "a/b.json"), lambda: read_record(store, Starts, "a/b.json")):
        with pytest.raises(StorageError, match=r"not JSON|not a JSON object|nested deeper than 200|half a surrogate") as error:
            read()
        told(error.value, "a/b.json")


@pytest.mark.parametrize("data", BROKEN)
def test_what_lies_beside_weights_too(tmp_path: Any, intent: Task, data: bytes) -> None:
    (tmp_path / LABELS).write_bytes(data)
    for read in (lambda: parse_form(data, LABELS), lambda: read_scheme(str(tmp_path), intent.schema)):
        with pytest.raises(ConfigError) as error:
            read()
        told(error.value, LABELS)


def test_the_records_above_are_good_ones(store: Storage) -> None:
    for path in ("plan/ab/receipt.json", append_log.entry_path(LOG, 1), append_log.entry_path("reviews/t", 1)):
        plain, read = READERS[path]
        store.replace(path, json.dumps(plain).encode())
        assert read(store)


def test_rows_are_counted_from_nought_and_moments_are_moments() -> None:
    with pytest.raises(StorageError, match=r"field rows\.in: .*greater than or equal to 0"):
        record.validate_record(Receipt, {**RECEIPT, "rows": {"in": -5}}, "plan/ab/receipt.json")
    long = {"in": "x" * 5000}
    with pytest.raises(StorageError) as error:
        record.validate_record(Receipt[StageResult], {**RECEIPT, "rows": long}, "plan/ab/receipt.json")
    assert "not a record of kind Receipt: field rows.in" in str(error.value)
    assert len(str(error.value)) < 600
    for at in ("soon", "2026-01-01T00:00:00"):
        with pytest.raises(StorageError, match="field at"):
            record.validate_record(PublishStart, {"snapshot": "ab", "at": at}, "x")


def test_a_pointer_that_is_no_text_is_told(store: Storage) -> None:
    for path, read in (("plan/LATEST", lambda: load_receipt(store, "plan")), ("CURRENT", lambda: release.current_release(store))):
        store.replace(path, b"\xff\xfe")
        with pytest.raises(StorageError, match="not UTF-8") as error:
            read()
        told(error.value, path)


@pytest.mark.parametrize(
    "text", ["2031-13-45", "2031-02-30", "2031-W05-3", "20310131", "2031-1-31", "2031-01-31T00", " 2031-01-31", "soon"]
)
def test_a_day_is_one_of_the_calendar(text: str) -> None:
    days = TypeAdapter(record.Day)
    assert [days.validate_python(fine) for fine in ("", "2028-02-29")] == ["", "2028-02-29"]
    with pytest.raises(ValidationError, match="this is no day, as 2031-01-31"):
        days.validate_python(text)
