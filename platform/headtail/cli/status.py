"""What a store holds: the latest receipt of each stage, the current release and what it was made from.

In: a root. Out: plain values, or a table for people. Reads pointers and receipts only; lists no directory.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from headtail.adapters.storage import open_existing
from headtail.adapters.storage.receipts import load_receipt
from headtail.adapters.tracking import tracking_uri
from headtail.core.config import TrackingConfig
from headtail.core.secrets import hide
from headtail.releases import release

STAGES = ("example-data", "ingest", "plan", "precompute", "evaluate", "curate", "distill", "gate", "publish", "replay", "report")


def status(root: str) -> dict[str, Any]:
    """Root, tracking, current release and latest receipts by stage. InputError when there is no such store."""
    store = open_existing(root)
    stages = {}
    for stage in STAGES:
        if store.exists(f"{stage}/LATEST"):
            found = load_receipt(store, stage)
            stages[stage] = {
                "path": found.path,
                "started": found.started,
                "seconds": found.seconds,
                "rows": found.rows,
                "run_id": found.run_id,
            }
    current = release.current(store) if store.exists(release.CURRENT) else None
    return {
        "root": store.root,
        "tracking": hide(tracking_uri(TrackingConfig(), root)),
        "release": current.model_dump(mode="json") if current else None,
        "stages": stages,
    }


def status_table(found: dict[str, Any]) -> Table:
    """`status` for people."""
    current = found["release"]
    title = f"{found['root']}  release {current['id']} (snapshot {current['snapshot']})" if current else f"{found['root']}  no release yet"
    table = Table("stage", "latest", "started", "rows", title=title, title_justify="left")
    for stage, item in found["stages"].items():
        rows = ", ".join(f"{key} {value:,}" for key, value in list(item["rows"].items())[:4])
        table.add_row(stage, item["path"], item["started"], rows)
    return table
