"""The page: receipts and summary as one self-contained HTML file, with inline figures, for light, dark and print.

In: the store, receipts by stage, the summary. Out: HTML text that loads nothing from anywhere and needs no script.
Everything that came from a query is escaped by the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from headtail.adapters import charts
from headtail.adapters.storage import Storage, read_bytes
from headtail.adapters.storage.receipts import output_table
from headtail.core.receipt import Receipt
from headtail.core.rows import SLICES, State
from headtail.stages.calibrate.words import promise_words
from headtail.stages.report.sentences import headline, ms, percent, report_notes, usd
from headtail.stages.report.tree import PATHS, Summary

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_EXAMPLES_EACH = 5  # examples shown per kind
_LONG = 160  # characters of an answer shown in the examples
_LONG_NAME = 32  # characters of a model's or input's name shown in a table
_FIGURES = {  # name on the page: output, stage, what it shows
    "coverage": ("coverage", "plan", "Share of events covered by the most frequent queries, before the cut and in holdout traffic"),
    "plan": ("plan", "plan", "The plan on one page: coverage to come with its band, cost of further coverage, ageing, what was decided"),
    "quality": ("quality", "evaluate", "Quality by stratum for each answer source with intervals"),
    "calibration": ("calibration", "evaluate", "Share of right answers by confidence"),
    "promise": ("calibration", "calibrate", "Whether confidence holds before and after calibration; share right among answers kept"),
    "latency": ("latency", "replay", "Share of requests answered within a given time, by who answered"),
}
_OF_STUDENT = (  # output, stage without the student, what it shows
    ("gate", "gate", "Each criterion of the gate: estimate, lower bound and threshold"),
    ("loss", "distill", "Training loss by step"),
)


def render(store: Storage, receipts: Mapping[str, Receipt], summary: Summary) -> str:
    """The whole page."""
    env = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    env.filters |= {
        "percent": percent,
        "number": format_number,
        "ms": ms,
        "usd": usd,
        "fixed": format_score,
        "when": format_time,
        "made_from": input_names,
        "short": short_name,
        "answer_text": answer_text,
    }
    models = summary.models
    figures = dict(_FIGURES)
    for student in summary.students:
        for output, stage, what in _OF_STUDENT:
            figures[f"{output}_{student.name}"] = (output, student.source.stage(stage), f"{what}: {student.label}")
    return env.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        s=summary,
        f=summary.figures,
        notes=report_notes(summary),
        headline=list(headline(summary)),
        promise_words=list(promise_words(summary.promise)) if summary.promise else [],
        sources=summary.columns,
        slices=SLICES,
        paths=PATHS,
        states=[str(s) for s in State],
        figures={name: _figure(store, receipts, name, *where) for name, where in figures.items()},
        examples=list(_examples(store, receipts, summary)),
        kinds=[source.source for source in summary.sources.values()],
        fixed=[source for source in summary.columns if not source.source.model],
        jobs=[source for source in models if source.job.rows["in"] is not None],
        sure=[source for source in models if source.ece is not None],
        gated=[source for source in models if source.gate.passed is not None],
        trained=[source for source in models if source.training.train_loss is not None],
    )


def _figure(store: Storage, receipts: Mapping[str, Receipt], name: str, output: str, stage: str, label: str) -> Markup | None:
    """The stage's SVG made fit for the page, or None when there is none."""
    for found in (stage, f"{stage}_teacher"):
        for own, ref in receipts[found].outputs.items() if found in receipts else ():
            if own in (f"{output}.svg", output) and ref.path.endswith(".svg"):
                return Markup(charts.inline(read_bytes(store, ref).decode(), name, label))  # our own drawing, its text escaped by it
    return None


def _examples(store: Storage, receipts: Mapping[str, Receipt], summary: Summary) -> Iterator[dict[str, Any]]:
    """Labelled queries on which the answer sources differ, the most frequent first: what a figure cannot show."""
    name = next((name for name in ("evaluate", "evaluate_teacher") if name in receipts), "")
    if not name:
        return
    rows, first, learner = pivot(output_table(store, receipts[name], "rows")), summary.teacher, summary.students[0]
    sources = [source for source in summary.models if any(source.name in row["sources"] for row in rows[:1])]
    both = [row for row in rows if {first.name, learner.name} <= row["sources"].keys()]
    if not both:
        wrong = [row for row in rows if not row["sources"].get(first.name, {}).get("exact", True)]
        yield {"kind": "Teacher wrong", "rows": wrong[: 2 * _EXAMPLES_EACH], "of": len(wrong), "sources": [first]}
        return
    kinds: dict[str, list[dict[str, Any]]] = {"Student right, teacher wrong": [], "Teacher right, student wrong": [], "Both wrong": []}
    for row in both:
        teacher, student = row["sources"][first.name], row["sources"][learner.name]
        if student["exact"] and not teacher["exact"]:
            kinds["Student right, teacher wrong"].append(row)
        elif teacher["exact"] and not student["exact"]:
            kinds["Teacher right, student wrong"].append(row)
        elif not teacher["exact"]:
            kinds["Both wrong"].append(row)
    for kind, found in kinds.items():
        yield {"kind": kind, "rows": found[:_EXAMPLES_EACH], "of": len(found), "sources": sources}


def pivot(rows: pa.Table) -> list[dict[str, Any]]:
    """Evaluate's rows with one entry per labelled row and its answer sources within, most frequent first."""
    found: dict[tuple[bytes, str], dict[str, Any]] = {}
    for line in rows.to_pylist():
        row = found.setdefault(
            (line["query_key"], line["wanted"]),
            {
                "query": line["query"],
                "stratum": line["stratum"],
                "count": line["count"],
                "wanted": answer_text(line["wanted"]),
                "sources": {},
            },
        )
        shown = answer_text(line["given"]) if line["given"] is not None else f"({line['state']})"
        row["sources"][line["source"]] = {"given": shown, "exact": line["exact"], "confidence": line["confidence"]}
    return sorted(found.values(), key=lambda row: (-(row["count"] or 0), row["query"]))


def answer_text(text: str) -> str:
    """An answer's JSON as a person would write it: `topic: pizza, location: nyc`, or the label alone."""
    shown = _plain(json.loads(text))
    return shown if len(shown) <= _LONG else shown[: _LONG - 1] + "…"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        if len(value) == 1:
            return _plain(next(iter(value.values())))
        if all(not isinstance(v, dict | list) for v in value.values()):
            return ": ".join(str(v) for v in value.values())
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "(nothing)"
    return str(value)


def format_number(value: float | None, digits: int = 0) -> str:
    """A number with thousands, a dash when unknown."""
    return "–" if value is None else f"{value:,.{digits}f}"


def format_score(value: float | None, digits: int = 2) -> str:
    """A score, a dash when unknown."""
    return "–" if value is None else f"{value:.{digits}f}"


def input_names(inputs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(what, short name, whole name) of a receipt's inputs: `head plan/ab12cd34`, `task 9f8e7d6c`."""
    return [(name.removeprefix(where).lstrip(".:/") or name, short_name(where), where) for name, where in inputs.items()]


def short_name(where: str) -> str:
    """A receipt's path, a digest or a model's name, short enough for a table: `plan/ab12cd34`, `9f8e7d6c`."""
    stage, sign, mark = where.rpartition("/")
    if re.fullmatch(r"[0-9a-f]{12,}", mark):
        return f"{stage}{sign}{mark[:8]}"
    return where if len(where) <= _LONG_NAME else f"{where[:_LONG_NAME]}…"


def format_time(text: str) -> str:
    """An ISO time as day and minute, UTC."""
    return text[:16].replace("T", " ")
