"""The report: everything a pipeline found, as one page for people and one JSON file for programs.

    receipts of the stages (any may be absent) -> Summary -> summary.json (plain names, docs/report.md), report.html, table()

Figures are copied from receipts, never computed from answers. Knows nothing of engines or of how a pipeline runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import StageConfig, execution
from headtail.core.errors import InputError
from headtail.core.receipt import Receipt, StageResult
from headtail.core.secrets import hide
from headtail.stages.base import Stage, run_once
from headtail.stages.report.flat import flat_summary
from headtail.stages.report.page import render
from headtail.stages.report.sentences import report_notes
from headtail.stages.report.summary import RESULTS, summarise
from headtail.stages.report.terminal import summary_table
from headtail.stages.report.tree import REPORTED_STAGES, Summary

__all__ = ["REPORTED_STAGES", "Config", "run", "summarise", "summary_table"]


class Config(StageConfig):
    """Which runs are reported on."""

    receipts: dict[str, str] = Field(
        {}, description=f"receipt path of each stage, by its name: {', '.join(REPORTED_STAGES)}; absent ones are 'not run'"
    )
    title: str = Field("headtail report", description="heading of the page")
    reused: tuple[str, ...] = execution((), "stages that the pipeline found done; shown in the lineage")


class Result(StageResult):
    """What the page shows."""

    summary: Summary = Field(description="every figure, as a tree; summary.json has the same under flat names")


def run(config: Config) -> Receipt[Result]:
    """Write report.html and summary.json over the given receipts."""
    store = open_storage(config.root)
    receipts = {name: _load(store, path) for name, path in config.receipts.items()}
    if not receipts:
        raise InputError(
            "nothing to report on", where="receipts", value=config.receipts, fix="name at least one receipt, such as plan: plan/ab12"
        )

    def work(stage: Stage) -> Result:
        summary = summarise(receipts, read_quality(store, receipts), config.title, config.reused, _paths(receipts, stage.path))
        local = stage.scratch / "report.html"
        local.write_text(hide(render(store, receipts, summary)), encoding="utf-8")
        stage.file("report", local)
        stage.json("summary", flat_summary(summary))
        stage.rows["stages"] = len(receipts)
        for text in report_notes(summary):
            stage.note(text)
        return Result(summary=summary)

    replaces = {"receipts": {name: receipt.path for name, receipt in receipts.items()}}
    return run_once("report", Result, config, work, inputs=receipts, version=3, replaces=replaces)


def _load(store: Storage, path: str) -> Receipt:
    stage = path.split("/")[0]
    return load_receipt(store, stage, path, RESULTS.get(stage, StageResult))


def read_quality(store: Storage, receipts: Mapping[str, Receipt]) -> list[dict[str, Any]]:
    """The quality table of the fullest evaluation there is: of both answer sources, else of the teacher alone."""
    for name in ("evaluate", "evaluate_teacher"):
        if name in receipts:
            return list(output_table(store, receipts[name], "quality").to_pylist())
    return []


def _paths(receipts: Mapping[str, Receipt], folder: str) -> dict[str, Any]:
    """Where in the store what was made is."""
    paths: dict[str, Any] = {"report": f"{folder}/report.html", "receipts": {name: found.path for name, found in receipts.items()}}
    for name in ("publish", "publish_head"):
        if name in receipts and "release" in receipts[name].outputs:
            paths["release"] = receipts[name].outputs["release"].path
            break
    return paths
