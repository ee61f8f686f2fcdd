"""Validity apart from quality: how often an answer source gives a valid answer, and how good these answers are by themselves.

In: SCORED rows. Out: VALIDITY rows. `quality` counts a row without a valid answer as missed: a source may be poor because it is often
silent or because it is often wrong, and the two are mended differently. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.core.intervals import f1_interval, share_interval
from headtail.core.rows import ALL, STRATA, Source
from headtail.stages.base import Stage
from headtail.stages.evaluate.scoring import Sureness, by_source

VALIDITY = pa.schema(
    [
        ("source", pa.string()),
        ("stratum", pa.string()),
        ("n", pa.int64()),  # labelled rows
        ("valid", pa.float64()),  # share of them with a valid answer
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("quality", pa.float64()),  # micro-F1 of the valid answers alone; null without any
        ("quality_low", pa.float64()),
        ("quality_high", pa.float64()),
        ("states", pa.string()),  # how the other rows ended: 3 truncated, 1 absent
    ]
)


def write_validity(stage: Stage, rows: pa.Table, sure: Sureness) -> None:
    """The table, and the share of valid answers of each source as a metric."""
    found = list(validity_rows(rows, sure))
    stage.table("validity", pa.Table.from_pylist(found, schema=VALIDITY))
    stage.metrics |= {f"valid/{line['source']}/{ALL}": line["valid"] for line in found if line["stratum"] == ALL}


def validity_rows(rows: pa.Table, sure: Sureness) -> Iterator[dict[str, Any]]:
    """VALIDITY rows of every source but the fallback, which is always valid."""
    for scored in by_source(rows):
        if scored.source == Source.FALLBACK:
            continue
        states = np.asarray(rows.filter(pc.equal(rows["source"], scored.source))["state"].to_pylist(), dtype=object)
        for name in (*STRATA, ALL):
            inside = scored.where(name)
            if not inside.any():
                continue
            share, held = share_interval(scored.answered[inside], sure.confidence), inside & scored.answered
            quality = f1_interval(scored.tp[held], scored.fp[held], scored.fn[held], **sure._asdict())
            known = quality.value == quality.value
            silent = Counter(states[inside & ~scored.answered].tolist())
            head = {"source": scored.source, "stratum": name, "n": int(inside.sum())}
            yield {
                **head,
                "valid": share.value,
                "low": share.low,
                "high": share.high,
                "quality": quality.value if known else None,
                "quality_low": quality.low if known else None,
                "quality_high": quality.high if known else None,
                "states": ", ".join(f"{count:,} {state}" for state, count in silent.most_common()),
            }
