"""Receipts and references to them."""

from __future__ import annotations

import pytest

from headtail.adapters.storage import Storage, read_json, write_json
from headtail.adapters.storage.receipts import load_receipt, load_ref
from headtail.core.errors import InputError, StorageError
from headtail.core.receipt import FileRef, Receipt, receipt_path


@pytest.fixture
def made(store: Storage) -> Receipt:
    path = receipt_path("plan", "ab" * 16)
    receipt = Receipt(
        stage="plan",
        fingerprint="ab" * 16,
        path=path,
        started="2026-01-01T00:00:00+00:00",
        seconds=1,
        outputs={"head": FileRef(path=f"{path}/head.parquet", bytes=1, sha256="0")},
    )
    write_json(store, f"{path}/receipt.json", receipt.model_dump(mode="json"))
    store.replace("plan/LATEST", path.encode())
    return receipt


@pytest.mark.parametrize("ref", ["latest", "ab" * 16, "plan/" + "ab" * 8])
def test_all_ways_to_name_a_receipt(store: Storage, made: Receipt, ref: str) -> None:
    assert load_receipt(store, "plan", ref) == made


@pytest.mark.parametrize("ref", ["plan:head", "plan/abababababababab:head"])
def test_table_refs(store: Storage, made: Receipt, ref: str) -> None:
    assert load_ref(store, ref) == (made, "head")


@pytest.mark.parametrize(
    "ref, said",
    [
        ("plan:tail", "no output tail"),
        ("head", "not a table reference"),
        ("plan/cd:head", "no finished plan"),
        ("curate:training_set", "has not been run"),
    ],
)
def test_bad_refs_say_what_to_do(store: Storage, made: Receipt, ref: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_ref(store, ref)


def test_a_store_of_an_older_version_is_refused(store: Storage, made: Receipt) -> None:
    path = f"{made.path}/receipt.json"
    older = {name: value for name, value in read_json(store, path).items() if name != "format"}
    for written in (older, {**older, "format": 1}, {**older, "format": 99}):
        write_json(store, path, written)
        with pytest.raises(StorageError, match="this store was written by another version of headtail") as error:
            load_receipt(store, "plan")
        assert error.value.fix.startswith("run the stages again in a new store")
