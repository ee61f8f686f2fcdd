"""What is read from a store can only name what lies in it: every field of every record, and the store's own check."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pkgutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

import headtail
from headtail.adapters.storage import LocalStorage, Storage, open_storage, write_json
from headtail.adapters.storage.receipts import load_receipt
from headtail.core import paths
from headtail.core.errors import HeadtailError
from headtail.core.receipt import Receipt

PACKAGE = Path(headtail.__file__).parent
HOSTILE = (
    "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\\..\\b", "a\0b", "a\nb", "a\x1b[2Jb", "a\u202eb", "C:/x", "~/x", "..", ".",
    "s3://other/x", "file:///etc/passwd", "a\ud800b", "a/" * 600 + "b", "x" * 300, "",
)  # fmt: skip
# Text of these records that no code uses as a path or an id, by name. Whoever adds a field decides here, or gives it a type of paths.py.
WORDS = {
    "started", "created", "at", "began", "note", "notes", "sha256", "settings", "versions", "rows", "metrics", "inputs", "template",
    "model", "source", "side_inputs", "examples", "action", "rows_by_source", "left_out", "min_confidence", "thresholds", "evidence",
    "file", "json_schema", "parts", "states", "reasons", "how", "missing_side_inputs", "host", "machine", "process", "since", "state",
    "best", "enough", "unknown",
    "made", "name", "score", "judge", "task", "task_fingerprint", "labels", "base", "tasks", "student", "url", "realtime", "signals",
    "engine", "answer_settings", "vocabulary", "digest", "kind", "reason", "first_day", "last_day", "holdout_from", "verdicts",
    "best_trial", "best_values", "head_limit", "stratum", "method", "candidate", "correction", "data", "dry_run", "prompt", "output",
    "schema_digest", "tokens", "symbols", "title", "headtail", "shown", "not_run", "remarks", "paths", "missing", "stage", "ref",
    "head_order", "decision", "headline", "salt", "who", "why", "query_key", "query", "answer", "outranks", "unreached", "families",
    "policy", "trained_on", "precision", "lora", "scoring", "relative_on", "ledger", "colour", "dark", "marker", "terminal", "without",
}  # fmt: skip
# The settings of example data, as its result keeps them: only what draws the data is read again, neither places nor tracking.
UNREAD = {
    "Config@headtail.examples.example_data": {"root", "label"},
    "TrackingConfig@headtail.core.config": {"uri", "experiment", "run_name", "parent_run"},
}
NAMES = ("StorePath", "StorePathOrEmpty", "StoreId", "StoreIdOrEmpty", "AnswersPath", "StudentOrEmpty")
TYPES = {getattr(paths, name) for name in NAMES}

READERS = {"read_record", "append_log.read_entry_records", "record.parse_record", "record.validate_record", "load_receipt", "run_once"}


def records() -> dict[str, type[BaseModel]]:
    """Models that the package builds from a store's JSON, and the models in them: found in the code, so that none is forgotten."""
    found: dict[str, type[BaseModel]] = {}
    for info in pkgutil.walk_packages(headtail.__path__, "headtail."):
        source = importlib.util.find_spec(info.name)
        assert source is not None
        tree = ast.parse(Path(str(source.origin)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS:
                names = [argument.id for argument in node.args if isinstance(argument, ast.Name)]
                for kind in (getattr(importlib.import_module(info.name), name, None) for name in names):
                    found |= {one.__qualname__ + "@" + one.__module__: one for one in nested(kind)}
    return found


def nested(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from nested(hint)
    for part in typing.get_args(kind):
        yield from nested(part)


def text_types(hint: Any) -> Iterator[Any]:
    """Each type of text in an annotation: plain `str`, or an Annotated one whole."""
    if typing.get_origin(hint) is typing.Annotated or hint is str or hint is Any:
        yield hint
    elif isinstance(hint, types.UnionType) or typing.get_args(hint):
        arguments = typing.get_args(hint)
        for part in arguments[1:] if typing.get_origin(hint) is dict else arguments:
            yield from text_types(part)


RECORDS = records()


def test_the_records_of_a_store_are_known() -> None:
    names = {name.partition("@")[0] for name in RECORDS}
    assert {
        "Receipt",
        "FileRef",
        "Release",
        "TaskCopy",
        "Move",
        "InputManifest",
        "SnapshotManifest",
        "PublishStart",
        "CatalogEntry",
        "Journal",
        "ShardReceipt",
        "PartFile",
        "Probe",
    } <= names


@pytest.mark.parametrize("kind", RECORDS.values(), ids=RECORDS)
def test_every_text_of_a_record_is_checked_or_is_listed_as_words(kind: type[BaseModel]) -> None:
    hints = typing.get_type_hints(kind, include_extras=True)
    words = WORDS | UNREAD.get(f"{kind.__qualname__}@{kind.__module__}", set())
    plain = [name for name in kind.model_fields if name not in words and any(one in (str, Any) for one in text_types(hints[name]))]
    assert not plain, (
        f"{kind.__qualname__}: give {plain} a type of headtail.core.paths, or list them in WORDS when they are neither path nor id"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_hostile_paths_are_refused_by_every_type(name: str, value: str) -> None:
    if value == "" and name.endswith("OrEmpty"):
        return
    with pytest.raises(ValidationError):
        TypeAdapter(getattr(paths, name)).validate_python(value)


@pytest.mark.parametrize("kind", RECORDS.values(), ids=RECORDS)
def test_hostile_values_are_refused_in_every_field(kind: type[BaseModel]) -> None:
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in kind.model_fields:
        if any(one in TYPES for one in text_types(hints[name])):
            value: Any = "../../x"
            outer = typing.get_origin(hints[name])
            held = [value] if outer is tuple else {"a": value} if outer is dict else value
            with pytest.raises(ValidationError) as caught:
                kind.model_validate({name: held})
            assert any(error["loc"][0] == name and error["type"] == "value_error" for error in caught.value.errors()), name


@given(st.text(alphabet=st.one_of(st.sampled_from("./\\~:\0\n a\u200b"), st.characters())))
def test_a_path_that_passes_stays_below_any_root(value: str) -> None:
    try:
        kept = paths.store_path(value)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/root", kept)) == f"/root/{kept}"


@given(st.lists(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=20), min_size=1, max_size=5))
def test_ordinary_paths_pass(parts: list[str]) -> None:
    assert paths.store_path("/".join(parts)) == "/".join(parts)


@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("value", HOSTILE[:8])
def test_a_store_takes_no_path_that_leads_out(tmp_path: Path, kind: str, value: str) -> None:
    """The store's own check: also text that came through no record."""
    store: Storage = open_storage(str(tmp_path / "store") if kind == "local" else "s3://bucket/store")
    for call in (store.exists, store.read, store.size, store.full, store.remove, store.files):
        with pytest.raises(HeadtailError):
            call(value)
    for write in (store.replace, store.create):
        with pytest.raises(HeadtailError):
            write(value, b"")
    with pytest.raises(HeadtailError):
        store.fetch(value, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_link_in_a_store_leads_nowhere_else(tmp_path: Path) -> None:
    secret, root = tmp_path / "secret", tmp_path / "store"
    secret.mkdir()
    root.mkdir()
    (secret / "manifest.json").write_text("{}")
    (root / "snapshots").symlink_to(secret)
    (root / "inside").mkdir()
    (root / "link").symlink_to(root / "inside")
    store = open_storage(str(root))
    for call in (store.read, store.remove):
        with pytest.raises(HeadtailError, match="leads out of it"):
            call("snapshots/manifest.json")
    assert (secret / "manifest.json").exists()
    store.replace("link/a", b"1")
    assert store.read("inside/a") == b"1"


def test_a_receipt_names_files_of_its_own_stage_only(store: Storage) -> None:
    made = {"stage": "plan", "fingerprint": "ab", "path": "plan/ab", "started": "", "seconds": 0}
    good = Receipt.model_validate(made)
    for change in (
        {"path": "precompute/ab"},
        {"path": "plan/ab/cd"},
        {"outputs": {"head": {"path": "precompute/ab/x", "bytes": 1, "sha256": ""}}},
        {"outputs": {"head": {"path": "/home/me/.bashrc", "bytes": 1, "sha256": ""}}},
    ):
        with pytest.raises(ValidationError):
            Receipt.model_validate({**made, **change})
    write_json(store, "plan/cd/receipt.json", good.model_dump(mode="json"))
    with pytest.raises(HeadtailError, match="another folder"):
        load_receipt(store, "plan", "cd")
    for ref in ("../../x", "plan/../../x", "/x"):
        with pytest.raises(HeadtailError, match="not a reference"):
            load_receipt(store, "plan", ref)


def test_an_absolute_path_in_a_receipt_writes_nothing_on_the_readers_machine(tmp_path: Path) -> None:
    """As it was found: resolving a student whose receipt names an absolute path."""
    from headtail.engines.models import resolve_weights

    store = LocalStorage(str(tmp_path / "store"))
    outputs = {"model/config.json": {"path": str(tmp_path / "victim"), "bytes": 1, "sha256": "0"}}
    text = {"format": 3, "stage": "distill", "fingerprint": "ab", "path": "distill/ab", "started": "", "seconds": 0, "outputs": outputs}
    store.replace("distill/ab/receipt.json", json.dumps(text).encode())
    with pytest.raises(HeadtailError, match="relative to the store's root"):
        resolve_weights("distill/ab", "", store)
    assert not (tmp_path / "victim").exists()
