"""Take one query out of the tables and documents of a store, so that receipts still name what is there.

In: a store, the query's key and text. Out: tables rewritten without its rows, documents without it, references (path, bytes, SHA-256, rows)
that agree with the files again. Every step may be repeated: which tables are concerned is written down before the first is touched.
Snapshots, releases, models and MLflow's files are not looked at here. Knows nothing of what the tables are for.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, open_table, stream_table, write_table
from headtail.core.keys import normalise, sha256_stream
from headtail.core.query import clean_text
from headtail.core.receipt import FileRef
from headtail.review.log import LOGS

TABLE, DOCUMENTS = ".parquet", (".html", ".svg", ".md", ".csv", ".jsonl", ".txt")
_ELSEWHERE = ("snapshots/", "releases/", "overrides/", "deletions/", "mlartifacts/", "mlruns/")  # not this module's
_MODELS = ("distill/", "sweep/", "reference/")  # stages whose other files are weights and vocabularies
_NAMES = ("query", "normalised")  # fields of a JSON object that hold a query's text
_LISTS = ("examples", "queries")  # fields that hold a list of texts


@dataclass(frozen=True)
class DeletedQuery:
    """The query that is deleted: its key, and its text (normalised, without personal data)."""

    key: bytes
    text: str

    def matches(self, text: str) -> bool:
        """Whether `text`, as people type it, is this query."""
        return text == self.text or clean_text(text) == self.text


def files_to_scrub(store: Storage) -> list[str]:
    """Every file of the store that this module looks at."""
    return [one.path for one in store.files("") if not one.path.startswith(_ELSEWHERE)]


def find_tables(store: Storage, files: list[str], gone: DeletedQuery) -> dict[str, int]:
    """Tables that hold the query, and how many of their rows."""
    found = {path: sum(int(pc.sum(mask).as_py() or 0) for _, mask in _marked(store, path, gone)) for path in files if path.endswith(TABLE)}
    return {path: rows for path, rows in found.items() if rows}


def rewrite_table(store: Storage, path: str, gone: DeletedQuery) -> None:
    """The table at `path` without the query's rows, in the same place."""
    with open_table(store, path) as opened:
        schema = opened.schema_arrow
    write_table(store, path, (batch.filter(pc.invert(mask)) for batch, mask in _marked(store, path, gone)), schema)


def current_reference(store: Storage, path: str) -> FileRef:
    """A reference to the file that is at `path` now."""
    rows = None
    if path.endswith(TABLE):
        with open_table(store, path) as opened:
            rows = opened.metadata.num_rows
    with store.open(path) as file:
        return FileRef(path=path, bytes=store.size(path), sha256=sha256_stream(file), rows=rows)


def _marked(store: Storage, path: str, gone: DeletedQuery) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
    """The batches of a table, and which of their rows are of the query. Yields nothing for a table without queries."""
    with open_table(store, path) as opened:
        names = set(opened.schema_arrow.names)
    if names & {"query_key", "query", "text"}:
        for batch in stream_table(store, path):
            yield batch, _mask(batch, names, gone)


def _mask(batch: pa.RecordBatch, names: set[str], gone: DeletedQuery) -> pa.Array:
    if "query_key" in names:
        column = batch.column("query_key")
        return pc.fill_null(pc.equal(column, pa.scalar(gone.key, column.type)), False)
    column = batch.column("query" if "query" in names else "text")  # a log as it was typed; rows that ingest set aside
    if not pa.types.is_string(column.type):
        return pa.repeat(pa.scalar(False), batch.num_rows)
    texts = [text for text in pc.unique(column).to_pylist() if text is not None]
    hits = [text for text in texts if (gone.matches(text) if "query" in names else gone.text in normalise(text))]
    return pc.is_in(column, value_set=pa.array(hits, column.type))


def scrub_documents(store: Storage, files: list[str], gone: DeletedQuery, changed: dict[str, FileRef]) -> tuple[int, list[str]]:
    """JSON without the query and with references that are true (`changed`, which grows); pages that show it are removed.

    How many JSON files were rewritten; folders of runs that lost a page: their receipts go too, so that they are made again.
    """
    rewritten = 0
    paths = [path for path in files if path.endswith(".json") and not path.startswith(LOGS) and "/model/" not in path]
    for path in sorted(paths, key=lambda path: (path.endswith("/receipt.json"), path)):  # receipts name the others: last
        plain = json.loads(store.read(path))
        if (made := _scrubbed(plain, gone, changed)) != plain:
            store.replace(path, (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode())
            changed[path] = current_reference(store, path)
            rewritten += 1
    return rewritten, [_run_of(path) for path in _remove_pages(store, files, gone)]


def _remove_pages(store: Storage, files: list[str], gone: DeletedQuery) -> Iterator[str]:
    for path in files:
        if path.endswith(DOCUMENTS) and not path.startswith(_MODELS):
            text = normalise(html.unescape(store.read(path).decode("utf-8", "replace")))
            if re.search(rf"(?<!\w){re.escape(gone.text)}(?!\w)", text):
                store.remove(path)
                store.remove(f"{_run_of(path)}/receipt.json")
                yield path


def _run_of(path: str) -> str:
    return "/".join(path.split("/")[:2])


def _scrubbed(node: Any, gone: DeletedQuery, changed: Mapping[str, FileRef]) -> Any:
    """`node` without objects and texts of the query; a reference to a changed file says what is there now."""
    if isinstance(node, list):
        return [_scrubbed(item, gone, changed) for item in node if not _is_of(item, gone)]
    if not isinstance(node, dict):
        return node
    made = {name: None if _is_of(item, gone) else _scrubbed(item, gone, changed) for name, item in node.items()}
    for name in _LISTS:
        if isinstance(texts := made.get(name), list):
            made[name] = [text for text in texts if not _spells(text, gone)]
    if {"path", "sha256"} <= made.keys() and (ref := changed.get(str(made["path"]))) is not None:
        made |= {"bytes": ref.bytes, "sha256": ref.sha256} | ({"rows": ref.rows} if made.get("rows") is not None else {})
    return made


def _is_of(item: Any, gone: DeletedQuery) -> bool:
    return isinstance(item, dict) and any(_spells(item.get(name), gone) for name in _NAMES)


def _spells(text: Any, gone: DeletedQuery) -> bool:
    return isinstance(text, str) and gone.matches(text)
