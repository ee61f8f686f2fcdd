"""The input of a job under test: a store with a finished plan, as headtail's own stages would leave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from headtail.adapters.storage import open_storage, write_json, write_table
from headtail.core import keys
from headtail.core.receipt import Receipt
from headtail.core.rows import PLANNED, with_side_inputs

SIDE = ("businesses",)
_WHAT = (
    "pizza",
    "thai food",
    "coffee",
    "hardware store",
    "emergency vet",
    "piano lessons",
    "used bikes",
    "late pharmacy",
    "tax help",
    "vinyl",
)
_HOW = ("cheap", "best", "open now", "24 hour", "kid friendly", "quiet", "family owned", "new")
_WHERE = ("boston", "near me", "austin tx", "in portland", "downtown chicago", "oakland", "on main street", "by the airport", "miami beach")


def plan(root: str, queries: Sequence[str]) -> None:
    """A plan whose `head` holds these queries."""
    store = open_storage(root)
    rows: list[dict[str, Any]] = [
        {"query_key": keys.query_key(query), "query": query, "count": i + 1, "stratum": "head", "eval_only": False}
        for i, query in enumerate(queries)
    ]
    ref = write_table(store, "plan/chaos/head.parquet", pa.Table.from_pylist(rows, schema=with_side_inputs(PLANNED, SIDE)))
    receipt = Receipt(stage="plan", fingerprint="chaos", path="plan/chaos", started="", seconds=0, outputs={"head": ref})
    write_json(store, "plan/chaos/receipt.json", receipt.model_dump(mode="json"))
    store.replace("plan/LATEST", b"plan/chaos")


def bucket(root: str) -> None:
    """The bucket of an s3:// root, at the endpoint that the environment names."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=root.removeprefix("s3://").split("/")[0])


def sentences(count: int) -> list[str]:
    """Queries that a search engine might get, all different: for the real model."""
    found = [f"{how} {what} {where}" for where in _WHERE for what in _WHAT for how in _HOW]
    assert count <= len(found)
    return found[:count]
