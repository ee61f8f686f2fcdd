"""Is every row there once, and every file whole: looked at from outside, with pyarrow and hashlib alone.

In: a store's root and what is expected of it. Out: Findings. What a reader or a resumed job can reach is followed by its
names and digests: the receipt that LATEST points to, the receipts of shards, and, while a job is not finished, its
manifest and journals. None of headtail's own code is used, so that a fault of its books shows.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

STATES = frozenset({"answered", "truncated", "invalid", "refused", "failed"})
_TOLD = 5


@dataclass
class Findings:
    """Counts of what is wrong; all zero when nothing is. `problems` says some of it in words."""

    rows: int = 0
    missing: int = 0  # expected, not there
    duplicated: int = 0  # there more than once
    unasked: int = 0  # there, not expected
    wrong: int = 0  # in a state it should not be in, or with another row's answer
    unreadable: int = 0  # files that a receipt or journal names and that are absent, cut or changed
    changed: int = 0  # files that a second run after success changed, and rows that it asked
    problems: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.missing + self.duplicated + self.unasked + self.wrong + self.unreadable + self.changed

    def say(self, what: str) -> None:
        if len(self.problems) < _TOLD * 4:
            self.problems.append(what)


class Tree:
    """The files under a root, on disk or on S3, without headtail.adapters.storage."""

    def __init__(self, root: str, environment: Mapping[str, str]) -> None:
        if root.startswith("s3://"):
            parts, endpoint = urlsplit(root), urlsplit(environment["AWS_ENDPOINT_URL"])
            self.base = parts.netloc + parts.path
            self.files: pafs.FileSystem = pafs.S3FileSystem(
                access_key=environment["AWS_ACCESS_KEY_ID"],
                secret_key=environment["AWS_SECRET_ACCESS_KEY"],
                region=environment["AWS_DEFAULT_REGION"],
                endpoint_override=endpoint.netloc,
                scheme=endpoint.scheme,
            )
        else:
            self.base, self.files = root, pafs.LocalFileSystem()

    def names(self, folder: str = "") -> list[str]:
        """Paths of all files under `folder`, relative to the root."""
        base = f"{self.base}/{folder}".rstrip("/")
        found = self.files.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
        return sorted(str(info.path)[len(self.base) + 1 :] for info in found if info.type == pafs.FileType.File)

    def read(self, path: str) -> bytes:
        with self.files.open_input_file(f"{self.base}/{path}") as file:
            return bytes(file.read())

    def digests(self, folder: str = "") -> dict[str, str]:
        """SHA-256 of every file under `folder`."""
        return {name: hashlib.sha256(self.read(name)).hexdigest() for name in self.names(folder)}


def named_files(value: object) -> Iterator[dict[str, Any]]:
    """Every file that a JSON value names with its digest, wherever in it."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) and isinstance(value.get("sha256"), str):
            yield value
        for item in value.values():
            yield from named_files(item)
    elif isinstance(value, list):
        for item in value:
            yield from named_files(item)


def reachable(tree: Tree) -> list[str]:
    """The JSON files that somebody reads: receipts and catalogs always, a job's own work only while it may go on."""
    names = [name for name in tree.names() if name.endswith(".json") and not name.rpartition("/")[2].startswith(".")]
    finished = {name.removesuffix("receipt.json") for name in names if name.endswith("/receipt.json")}
    return [name for name in names if not _over(tree, name, names, finished)]


def _over(tree: Tree, name: str, names: list[str], finished: set[str]) -> bool:
    """Whether `name` is work that no resume reads: its job has a receipt, or its shard has one and no failed row to ask again."""
    job, sign, rest = name.partition("/work/")
    if not sign or f"{job}/" in finished:
        return bool(sign)
    shard = re.fullmatch(r"shards/(\d+)/journal\.json", rest)
    if shard is None:
        return False
    editions = [one for one in names if re.fullmatch(rf"{re.escape(job)}/shards/{shard[1]}-\d+\.json", one)]
    if not editions:
        return False
    latest = max(editions, key=lambda one: int(one.rpartition("-")[2].removesuffix(".json")))
    return not json.loads(tree.read(latest))["states"].get("failed", 0)


def check_files(tree: Tree, found: Findings) -> None:
    """Every file that can be reached is there and is what its digest says. A named file may itself name more."""
    looked: dict[tuple[str, str], bool] = {}
    for name in reachable(tree):
        try:
            value = json.loads(tree.read(name))
        except (OSError, ValueError) as error:
            found.unreadable += 1
            found.say(f"{name} is not JSON, or cannot be read: {error}")
            continue
        for ref in named_files(value):
            key = (ref["path"], ref["sha256"])
            if key not in looked:
                looked[key] = _whole(tree, ref, name, found)


def _whole(tree: Tree, ref: Mapping[str, Any], named_by: str, found: Findings) -> bool:
    try:
        data = tree.read(ref["path"])
        problem = (
            "" if hashlib.sha256(data).hexdigest() == ref["sha256"] else f"has {len(data)} bytes, not the {ref['bytes']} of its digest"
        )
        if not problem and ref["path"].endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(data)).num_rows
            problem = "" if ref.get("rows") in (None, rows) else f"has {rows} rows, not {ref['rows']}"
    except (OSError, pa.ArrowInvalid) as error:
        problem = f"cannot be read: {str(error)[:120]}"
    if problem:
        found.unreadable += 1
        found.say(f"{ref['path']}, named by {named_by}, {problem}")
    return not problem


def check_rows(tree: Tree, expected: Mapping[str, frozenset[str]], found: Findings, echo: bool) -> None:
    """The published answers against the input, by anti-join both ways. `echo`: answers end with their row's query."""
    try:
        receipt = json.loads(tree.read(f"{tree.read('precompute/LATEST').decode().strip()}/receipt.json"))
        refs = [ref for name, ref in sorted(receipt["outputs"].items()) if name.startswith("answers/")]
        tables = [pq.read_table(io.BytesIO(tree.read(ref["path"])), columns=["query", "state", "answer"]) for ref in refs]
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        found.missing += len(expected)
        found.say(f"no published answers: {type(error).__name__}: {str(error)[:200]}")
        return
    rows = [row for table in tables for row in table.to_pylist()]
    found.rows += len(rows)
    given = Counter(row["query"] for row in rows)
    for name, queries in (
        ("missing", [query for query in expected if query not in given]),
        ("duplicated", [query for query, count in given.items() if count > 1]),
        ("unasked", [query for query in given if query not in expected]),
    ):
        if queries:
            setattr(found, name, getattr(found, name) + len(queries))
            found.say(f"{len(queries)} {name}: {', '.join(map(repr, queries[:_TOLD]))}")
    for row in rows:
        if problem := _wrong(row, expected.get(row["query"], STATES), echo):
            found.wrong += 1
            found.say(f"{row['query']!r} {problem}")
    if receipt["rows"].get("in") != len(expected):
        found.wrong += 1
        found.say(f"the receipt says {receipt['rows'].get('in')} rows in, there were {len(expected)}")


def _wrong(row: Mapping[str, Any], states: frozenset[str], echo: bool) -> str:
    if row["state"] not in states:
        return f"is {row['state']}, should be {' or '.join(sorted(states))}"
    if (row["state"] == "answered") != (row["answer"] is not None):
        return f"is {row['state']} and its answer is {row['answer']!r}"
    if echo and row["answer"] is not None and not json.loads(row["answer"])["segments"][0]["text"].endswith(row["query"]):
        return f"has another row's answer: {row['answer'][:120]}"
    return ""
