"""Shadow: how served answers agree with those of another model, from what a server in shadow mode wrote.

In: `shadow/` of the store (rows.SHADOW). Out: tables agreement (by release and source) and suspects (rows.SUSPECT: served answers that the
model does not give, for `headtail review`). The sample is random by request, so the shares speak of traffic. A model is no person: a figure
says how far two models agree, not which is right. Knows nothing of servers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage, read_table
from headtail.adapters.storage.day_files import day_of, list_day_files
from headtail.core.config import StageConfig
from headtail.core.errors import InputError
from headtail.core.intervals import clopper_pearson
from headtail.core.keys import fingerprint, query_key
from headtail.core.receipt import Receipt, StageResult
from headtail.core.record import Day
from headtail.core.rows import SHADOW, SUSPECT, conform
from headtail.stages.base import Stage, run_once

STAGE, VERSION = "shadow", 1
AGREEMENT = pa.schema(
    [
        ("release", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),  # that was asked
        ("n", pa.int64()),  # rows
        ("answered", pa.int64()),  # of them: with an answer of the model
        ("agree", pa.float64()),  # share of these that are wholly the same; null without any
        ("low", pa.float64()),  # its interval, 95 %
        ("high", pa.float64()),
        ("score", pa.float64()),  # mean score, 0..1
        ("usd", pa.float64()),  # what all rows cost
    ]
)


class Config(StageConfig):
    """Which days are read."""

    since: Day = Field("", description="first day that is read, as 2031-01-31; empty: all")


class Result(StageResult):
    """What came of it."""

    rows: int = Field(0, description="answers that the model was asked for too")
    agree: float | None = Field(None, description="share of those it answered that are wholly the same")
    usd: float = Field(0.0, description="what they cost")
    suspects: int = Field(0, description="answers for review")


def run(config: Config) -> Receipt[Result]:
    """Read the rows once for each state of the folder. InputError when there is none."""
    store = open_storage(config.root)
    files = {path: size for path, size in list_day_files(store, STAGE).items() if day_of(path) >= config.since}
    if not files:
        fix = "start the server with shadow.model and shadow.share_misses: docs/serve.md"
        raise InputError("the store has no rows of shadow mode", where=store.uri(STAGE), value=config.since or None, fix=fix)
    return run_once(
        STAGE, Result, config, lambda stage: _work(stage, sorted(files)), inputs={"shadow": fingerprint(files, STAGE)}, version=VERSION
    )


def _work(stage: Stage, files: Sequence[str]) -> Result:
    rows = pa.concat_tables([conform(read_table(stage.store, path), SHADOW, path) for path in files]).to_pylist()
    figures, suspects = agreement_figures(rows), rank_suspects(rows)
    stage.table("agreement", pa.Table.from_pylist(figures, schema=AGREEMENT))
    stage.table("suspects", pa.Table.from_pylist(suspects, schema=SUSPECT))
    compared = [row["agree"] for row in rows if row["agree"] is not None]
    agree, usd = (sum(compared) / len(compared) if compared else None), sum(row["usd"] for row in rows)
    stage.rows = {"in": len(rows), "compared": len(compared), "differ": compared.count(False), "suspects": len(suspects)}
    stage.metrics = {"usd": usd} | ({"agree": agree} if agree is not None else {})
    stage.note("agreement with a model is no quality: human labels say which of the two is right")
    for row in figures:
        share = f"{row['agree']:.1%} ({row['low']:.1%} to {row['high']:.1%})" if row["agree"] is not None else "no answer to compare"
        counted = f"{row['answered']:,} of {row['n']:,} rows, USD {row['usd']:.4g}"
        say(f"shadow       {row['release']}  {row['source']:<16} agree {share}, {counted}")
    say(f"{'':<12} headtail review serve --set suspects={stage.path}:suspects")
    return Result(rows=len(rows), agree=agree, usd=usd, suspects=len(suspects))


def agreement_figures(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of AGREEMENT, by release, source and model. Pure."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["release"], row["source"], row["model"]].append(row)
    made = []
    for (release, source, model), some in sorted(groups.items()):
        compared = [row for row in some if row["agree"] is not None]
        right = sum(row["agree"] for row in compared)
        low, high = clopper_pearson(right, len(compared)) if compared else (None, None)
        figures = {
            "agree": right / len(compared) if compared else None,
            "low": low,
            "high": high,
            "score": sum(row["score"] for row in compared) / len(compared) if compared else None,
        }
        sums = {"n": len(some), "answered": len(compared), "usd": sum(row["usd"] for row in some)}
        made.append({"release": release, "source": source, "model": model, **sums, **figures})
    return made


def rank_suspects(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of rows.SUSPECT: queries of which the last served answer is not the model's, by what they lose: score times requests. Pure."""
    by_query: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["agree"] is not None:
            by_query[row["query"]].append(row)
    found = []
    for query, some in by_query.items():
        last = max(some, key=lambda row: row["time"])
        if last["agree"]:
            continue
        found.append(
            {
                "query_key": query_key(query),
                "query": query,
                "answer": last["answer"],
                "answer_key": None,
                "stratum": None,
                "count": len(some),
                "score": 1 - last["score"],
                "gain": (1 - last["score"]) * len(some),
                "reasons": [f"{last['model']} answers otherwise than {last['source']}"],
                "alternatives": sorted({row["shadow"] for row in some}),
                "confidence": last["confidence"],
                "agreement": None,
            }
        )
    return sorted(found, key=lambda row: (-row["gain"], row["query"]))
