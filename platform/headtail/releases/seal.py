"""Sealed human labels: a share that the gate alone reads, so that nothing else can be fitted to it.

In: a table of human labels. Out: `seals/<n>.json`, and for every other reader the table without its sealed rows. A row is sealed for
good, by its query's key, whatever table or task it is in later, and with it all rows that nearly repeat it, in this table and in those that
were sealed before; rows of which somebody looked at one before cannot be sealed. Which are drawn is decided by their keys alone. Knows
nothing of criteria.
"""

from __future__ import annotations

import datetime
from collections import defaultdict

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_ref, output_table
from headtail.core.config import Config
from headtail.core.label_design import thin_design
from headtail.core.near_duplicates import duplicate_clusters
from headtail.core.paths import StoreId
from headtail.core.receipt import Receipt
from headtail.core.rows import KEY, uniform_draw
from headtail.releases.look import keep_keys, ledger_of, load_keys, seen_keys

SEALS = "seals"
LEAST_LABELS = 100  # below, half of them shows nothing, and all are needed to see anything


class Seal(Config):
    """One call of `headtail labels seal`."""

    labels: str = Field(description="table ref of the human labels")
    share: float = Field(gt=0, lt=1, description="share of the rows that were drawn")
    rows: StoreId = Field(description="digest of the sealed keys; looks/rows/<digest> holds them")
    count: int = Field(ge=1, description="how many")
    at: str = Field(description="UTC, ISO 8601")


def seal_labels(store: Storage, ref: str, table: pa.Table, share: float) -> tuple[int, int]:
    """Seal a share of a table's rows (`query_key`, `query`): (rows that are sealed now, rows that were drawn but stay open, since somebody
    looked at them, or at a row that they nearly repeat, before)."""
    mine, known = set(table["query_key"].to_pylist()), _known_queries(store, table)
    keys, before = pa.array(known, KEY), sealed_keys(store)
    drawn = dict(zip(known, uniform_draw(keys, "seal", 0) < share, strict=True))
    seen, fresh, left = seen_keys(store) - before, set[bytes](), set[bytes]()  # the gate's own looks are at sealed rows
    clusters: dict[int, set[bytes]] = defaultdict(set)
    for key, cluster in zip(known, duplicate_clusters(list(known.values())).tolist(), strict=True):
        clusters[cluster].add(key)
    for rows in clusters.values():
        if rows & mine and (drawn[min(rows)] or rows & before):
            (left if rows & seen else fresh).update(rows - before)
    if fresh:
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        made = Seal(labels=ref, share=share, rows=keep_keys(store, sorted(fresh)), count=len(fresh), at=at)
        data = (made.model_dump_json() + "\n").encode()
        append_log.append_entry(ledger_of(store), SEALS, lambda _: data)
    return len((before | fresh) & mine), len(left & mine)


def _known_queries(store: Storage, table: pa.Table) -> dict[bytes, str]:
    """Query by key: of the table, and of the tables that were sealed before and are still there."""
    tables = [table]
    for ref in dict.fromkeys(seal.labels for seal in _read_seals(store)):
        if store.exists(f"{ref.rpartition(':')[0]}/receipt.json"):
            receipt, name = load_ref(store, ref)
            tables.append(output_table(store, receipt, name, ["query_key", "query"]))
    return {key: query for one in tables for key, query in zip(one["query_key"].to_pylist(), one["query"].to_pylist(), strict=True)}


def keep_for_gate(store: Storage, labelled: Receipt, share: float) -> None:
    """Seal a share of a plan's human labels before anything looks at them, unless they are few."""
    rows = labelled.output("human_labels").rows or 0
    if not share or not rows:
        return
    if rows < LEAST_LABELS:
        say(
            f"{'labels':<12} {rows:,} are too few to keep some for the gate (from {LEAST_LABELS}): each evaluation is a look at all of them"
        )
        return
    table = output_table(store, labelled, "human_labels", ["query_key", "query"])
    sealed, _ = seal_labels(store, f"{labelled.path}:human_labels", table, share)
    say(f"{'labels':<12} {sealed:,} of {rows:,} are sealed: the gate alone reads them")


def sealed_keys(store: Storage) -> set[bytes]:
    """Keys of all rows that were ever sealed in this store."""
    return set().union(*(load_keys(store, seal.rows) for seal in _read_seals(store)))


def seals_digest(store: Storage) -> str:
    """Changes with every seal: what is open changes with it. Empty without any."""
    return "+".join(sorted(seal.rows for seal in _read_seals(store)))


def _read_seals(store: Storage) -> list[Seal]:
    return list(append_log.read_entry_records(ledger_of(store), Seal, SEALS))


def split_labels(store: Storage, table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(open rows, sealed rows) of a table of human labels."""
    sealed = sealed_keys(store)
    if not sealed:
        return table, table.slice(0, 0)
    inside = pc.is_in(table["query_key"], value_set=pa.array(sorted(sealed), KEY))
    return _thin(table.filter(pc.invert(inside)), len(table)), _thin(table.filter(inside), len(table))


def _thin(part: pa.Table, whole: int) -> pa.Table:
    """A part of `whole` labels, with the chances of inclusion of that part: half of a census is none."""
    if "inclusion" not in part.column_names or not len(part):
        return part
    pairs = zip(part["design"].to_pylist(), part["inclusion"].to_pylist(), strict=True)
    made = [thin_design(design, inclusion, len(part) / whole) for design, inclusion in pairs]
    for name, values in (("design", [one for one, _ in made]), ("inclusion", [one for _, one in made])):
        place = part.column_names.index(name)
        part = part.set_column(place, part.schema.field(name), pa.array(values, part.schema.field(name).type))
    return part


def open_labels(store: Storage, table: pa.Table) -> pa.Table:
    """The rows that may be looked at by all: every reader of people's answers but the gate goes through here."""
    return split_labels(store, table)[0]
