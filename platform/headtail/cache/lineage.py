"""The log that answers go back to, and its words, by which guardrails know a correction.

In: receipts of answers. Out: the receipt of the one ingest that they descend from. Knows nothing of snapshots' contents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from headtail.adapters.storage import Storage, open_table, stream_table
from headtail.adapters.storage.receipts import load_receipt
from headtail.cache.words import count_words
from headtail.core.receipt import Receipt
from headtail.core.task import Task


def find_logs(store: Storage, answers: Sequence[Receipt]) -> list[Receipt]:
    """Receipts of the ingests that these answers descend from, each once."""
    return list({receipt.fingerprint: receipt for found in answers for receipt in find_ancestors(store, found.inputs, "ingest")}.values())


def write_words(store: Storage, log: Receipt, task: Task, least: int, folder: Path) -> Path:
    """The words of a log's queries and of the task's side inputs, as a Parquet file in `folder`; those of at least `least` events."""
    file = log.output("queries")
    with open_table(store, file.path) as opened:
        side = [name for name in task.side_inputs if name in opened.schema_arrow.names]
    words = count_words(stream_table(store, file, ["query", "count", *side]), side, least)
    path = folder / "words.parquet"
    pq.write_table(words, path, compression="zstd")
    return path


def find_ancestors(store: Storage, inputs: Mapping[str, str], kind: str, depth: int = 6) -> Iterator[Receipt]:
    """Receipts of stage `kind` that are reached through `inputs`, the nearest on each way."""
    for path in sorted(set(inputs.values())):
        if depth and path.count("/") == 1 and store.exists(f"{path}/receipt.json"):
            receipt = load_receipt(store, path.partition("/")[0], path)
            if receipt.stage == kind:
                yield receipt
            else:
                yield from find_ancestors(store, receipt.inputs, kind, depth - 1)
