"""Receipts of a store: found by stage and fingerprint, and the tables that they name.

In: a store and a reference: `latest`, `stage/fingerprint`, `stage:output`. Out: a Receipt, or an Arrow table proven to be what
its receipt names. Knows nothing of how a stage works.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast, overload

from headtail.adapters.storage.base import Storage
from headtail.adapters.storage.tables import read_record, read_table, read_text
from headtail.core.errors import InputError, StorageError
from headtail.core.paths import store_path
from headtail.core.receipt import FORMAT, LATEST, Receipt, StageResult, receipt_path

R = TypeVar("R", bound=StageResult)


@overload
def load_receipt(store: Storage, stage: str, ref: str = LATEST) -> Receipt: ...


@overload
def load_receipt(store: Storage, stage: str, ref: str, kind: type[R]) -> Receipt[R]: ...


def load_receipt(store: Storage, stage: str, ref: str = LATEST, kind: type[StageResult] = StageResult) -> Receipt:
    """The receipt of `stage` at `ref`: `latest` or the stage's bare name, a fingerprint, or its folder. `kind`: the stage's Result."""
    if ref in (LATEST, stage):
        pointer = f"{stage}/LATEST"
        if not store.exists(pointer):
            raise InputError(
                f"{stage} has not been run in this store", where=store.uri(stage), fix=f"run: headtail {stage} --root {store.root}"
            )
        ref = read_text(store, pointer).strip()
    folder = ref if ref.startswith(f"{stage}/") else receipt_path(stage, ref)
    try:
        store_path(folder)
    except ValueError as error:
        raise InputError(
            f"not a reference to a run: {error}", where=store.uri(stage), value=repr(ref), fix="`latest`, or stage/fingerprint"
        ) from None
    if not store.exists(f"{folder}/receipt.json"):
        raise InputError(
            f"no finished {stage} here", where=store.uri(folder), value=ref, fix="use `latest` or a folder that holds receipt.json"
        )
    form = cast(type[Receipt], Receipt.__class_getitem__(kind))  # Receipt[kind], which mypy has no words for
    receipt = read_record(store, form, f"{folder}/receipt.json", FORMAT)
    if receipt.path != folder:
        raise StorageError("this receipt is of another folder", where=store.uri(folder), value=receipt.path, fix=f"run {stage} again")
    return receipt


def load_ref(store: Storage, ref: str) -> tuple[Receipt, str]:
    """The receipt and output name of a table ref: `plan:head` (the latest plan) or `plan/ab12:head`."""
    where, sign, name = ref.rpartition(":")
    if not sign or not where or not name:
        raise InputError(
            "not a table reference", where="table ref", value=ref, fix="write stage:output or stage/fingerprint:output, such as plan:head"
        )
    stage = where.split("/")[0]
    receipt = load_receipt(store, stage, where if "/" in where else LATEST)
    receipt.output(name)
    return receipt, name


def output_table(store: Storage, receipt: Receipt, name: str, columns: list[str] | None = None) -> Any:
    """The named output as an Arrow table, proven to be what the receipt names."""
    return read_table(store, receipt.output(name), columns)
