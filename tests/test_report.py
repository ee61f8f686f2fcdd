"""The report from a fixed set of receipts: the same names and figures every time, one file, nothing loaded, nothing run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from conftest import answered_by
from headtail.adapters import charts
from headtail.adapters.storage import Storage, read_json, write_json, write_table
from headtail.core.answer_source import SOURCES, AnswerSource
from headtail.core.calibration import ConfidenceMap, StudentCalibration
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError
from headtail.core.evidence import Criterion, Evidence, JobFigures
from headtail.core.io_format import IOFormat
from headtail.core.keys import canonical, query_key
from headtail.core.receipt import FileRef, Receipt
from headtail.core.rows import QUALITY, SCORED, State
from headtail.stages import report
from headtail.stages.calibrate.result import CalibrationFigures, EscalationFigures, EstimatedShare
from headtail.stages.calibrate.result import Result as CalibrateResult
from headtail.stages.curate import Result as CurateResult
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.distill.result import TrainingTotals
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.evaluate.result import SourceFigures, TeacherDifference
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.gate.stage import criteria_figure as gate_figure
from headtail.stages.ingest.result import LogTotals
from headtail.stages.ingest.result import Result as IngestResult
from headtail.stages.plan.result import HeadForecast, PlanFigures
from headtail.stages.plan.result import Result as PlanResult
from headtail.stages.precompute.result import JobRows
from headtail.stages.publish import Result as PublishResult
from headtail.stages.publish.result import WithheldAnswer
from headtail.stages.replay import PathFigures, ReplayFigures, ServedRelease
from headtail.stages.replay import Result as ReplayResult
from headtail.stages.report import note, stage, terminal
from headtail.stages.report.page import answer_text, render
from headtail.stages.report.sentences import headline
from headtail.stages.report.summary import summarise
from headtail.stages.report.tree import REPORTED_STAGES, BatchFigures, PipelineFigures, QualityFigure, Summary, stages_of
from timescale import limit

EXPECTED = Path(__file__).parent / "expected"
OFF = TrackingConfig(enabled=False)
SECTIONS = (
    "headline",
    "coverage",
    "quality",
    "gate",
    "examples",
    "calibration",
    "escalation",
    "states",
    "latency",
    "cost",
    "training",
    "lineage",
    "notes",
)
REALTIME = ("distill_realtime", "precompute_realtime", "gate_realtime")
NASTY = '<script>alert(1)</script> & "quotes"'

# answer source: stratum: quality, low, high, exact
SCORES = {
    "teacher": {
        "head": (0.94, 0.91, 0.965, 0.9),
        "torso": (0.92, 0.87, 0.96, 0.86),
        "tail": (0.9, 0.85, 0.94, 0.84),
        "unseen": (0.86, 0.68, 0.96, 0.79),
    },
    "batch_student": {
        "head": (0.91, 0.875, 0.94, 0.85),
        "torso": (0.87, 0.81, 0.92, 0.79),
        "tail": (0.83, 0.77, 0.88, 0.73),
        "unseen": (0.78, 0.58, 0.91, 0.67),
    },
    "realtime_student": {
        "head": (0.93, 0.9, 0.955, 0.88),
        "torso": (0.9, 0.845, 0.945, 0.83),
        "tail": (0.88, 0.825, 0.925, 0.8),
        "unseen": (0.83, 0.64, 0.95, 0.75),
    },
    "fallback": {
        "head": (0.41, 0.36, 0.46, 0.33),
        "torso": (0.35, 0.28, 0.42, 0.3),
        "tail": (0.3, 0.24, 0.36, 0.24),
        "unseen": (0.33, 0.17, 0.53, 0.29),
    },
}
OVERALL = {
    "teacher": ((0.917, 0.896, 0.936, 0.867), (0.936, 0.905, 0.962, 0.892)),
    "batch_student": ((0.868, 0.842, 0.893, 0.787), (0.903, 0.866, 0.936, 0.84)),
    "realtime_student": ((0.9, 0.877, 0.921, 0.84), (0.925, 0.892, 0.954, 0.87)),
    "fallback": ((0.362, 0.331, 0.393, 0.293), (0.402, 0.353, 0.452, 0.325)),
}
SIZES = {"head": 180, "torso": 96, "tail": 120, "unseen": 24}


def quality_table(sources: tuple[str, ...] = ("teacher", "batch_student", "realtime_student", "fallback")) -> pa.Table:
    lines = []
    for source in sources:
        slices = {**SCORES[source], "all": OVERALL[source][0], "traffic": OVERALL[source][1]}
        for name, (value, low, high, exact) in slices.items():
            n = SIZES.get(name, 420 if name == "all" else 396)
            line = {
                "source": source,
                "stratum": name,
                "n": n,
                "answered": n - (source != "fallback"),
                "quality": value,
                "low": low,
                "high": high,
            }
            lines.append({**line, "exact": exact, "effective": float(n), "method": "clopper-pearson" if n < 30 else "bootstrap"})
    return pa.Table.from_pylist(lines, schema=QUALITY)


def rows_table() -> pa.Table:
    """A dozen labelled rows: (query, stratum, events, people, teacher, student), answers as `label:text` lists, None for truncated."""
    cases = [
        (
            "plumber near me",
            "head",
            8120,
            "topic:plumber location:near_me",
            "topic:plumber location:near_me",
            "topic:plumber location:near_me",
        ),
        ("starbuks", "head", 5400, "name:starbucks", "name:starbucks", "topic:starbucks"),
        (
            "best pizza brooklyn",
            "head",
            2210,
            "topic:pizza location:brooklyn",
            "topic:pizza location:brooklyn",
            "name:pizza location:brooklyn",
        ),
        (
            "dentist open sunday",
            "torso",
            41,
            "topic:dentist time:sunday",
            "topic:dentist none:open time:sunday",
            "topic:dentist time:sunday",
        ),
        (
            "how much is a tow truck",
            "torso",
            17,
            "question:how_much topic:tow_truck",
            "question:how_much topic:tow_truck",
            "topic:tow_truck",
        ),
        (
            "joes barber shop queens",
            "tail",
            1,
            "name:joe's_barber_shop location:queens",
            "name:joe's_barber_shop location:queens",
            "topic:barber_shop location:queens",
        ),
        ("vegan nail salon 24h", "tail", 1, "topic:vegan_nail_salon time:24h", "topic:nail_salon time:24h", "topic:nail_salon"),
        (
            "ramen late nite soho",
            "unseen",
            0,
            "topic:ramen time:late_night location:soho",
            "topic:ramen time:late_night location:soho",
            None,
        ),
        (NASTY, "tail", 1, "topic:script", "none:script", "none:alert"),
    ]
    lines = []
    for query, stratum, count, *answers in cases:
        wanted, *given = [_segments(a) for a in answers]
        for source, answer in zip(
            ("teacher", "batch_student", "fallback"), (*given, canonical({"segments": [{"label": "topic", "text": query}]})), strict=True
        ):
            base = {
                "query_key": query_key(query),
                "query": query,
                "stratum": stratum,
                "count": count,
                "source": source,
                "wanted": wanted,
                "given": answer,
            }
            state = "answered" if answer else "truncated"
            lines.append(
                {
                    **base,
                    "state": state,
                    "tp": 1,
                    "fp": 0,
                    "fn": 0,
                    "exact": answer == wanted,
                    "confidence": 0.75 if answer and source != "fallback" else None,
                }
            )
    return pa.Table.from_pylist(lines, schema=SCORED)


def _segments(text: str | None) -> str | None:
    if text is None:
        return None
    pairs = [part.split(":") for part in text.split()]
    return canonical({"segments": [{"label": label, "text": words.replace("_", " ")} for label, words in pairs]})


def figures() -> dict[str, Any]:
    """The stages' figures, drawn as the stages draw them."""
    lines = quality_table().to_pylist()
    rng = np.random.default_rng(0)
    bins = {
        source: [
            charts.ReliabilityBin(28, c, min(1.0, max(0.0, c - drop)), max(0.0, c - drop - 0.13), min(1.0, c - drop + 0.12))
            for c in np.linspace(0.42, 0.99, 15)
        ]
        for source, drop in (("teacher", 0.02), ("batch_student", 0.09))
    }
    labels = {"teacher": "teacher: ECE 0.021, AUROC 0.883", "batch_student": "batch_student: ECE 0.088, AUROC 0.842"}
    paths = {"cache": rng.lognormal(0.2, 0.35, 1424), "realtime": rng.lognormal(3.6, 0.3, 548), "fallback": rng.lognormal(7.6, 0.02, 28)}
    return {
        "quality": charts.quality_chart(
            [charts.QualityPoint(q["source"], q["stratum"], q["quality"], q["low"], q["high"], q["n"]) for q in lines]
        ),
        "calibration": charts.calibration_chart(bins, labels),
        "latency": charts.latency_chart({name: list(values) for name, values in paths.items()}),
    }


def evidence() -> Evidence:
    """Of a gate that the student passed: two criteria."""
    shared = {"level": 0.025, "p": 0.001, "passed": True}
    criteria = (
        Criterion(kind="quality", stratum="tail", threshold=0.75, n=120, value=0.83, lower_bound=0.772, method="betting", **shared),
        Criterion(kind="drop", stratum="all", threshold=-0.1, n=420, value=-0.049, lower_bound=-0.081, method="betting, paired", **shared),
    )
    return Evidence(
        passed=True,
        task="query_segmentation",
        candidate="distill/dddddddddddddddd",
        digest="sha256:00",
        source="batch_student",
        answers="precompute/eeeeeeeeeeeeeeee",
        evaluation="evaluate/ffffffffffffffff",
        score="f1",
        delta=0.05,
        candidates=1,
        correction="Holm over 2 criteria at 0.05 / 1 candidates",
        criteria=criteria,
        data={"rows": "a" * 64, "human_labels": "b" * 64},
    )


def refused() -> Evidence:
    """Of a gate that rejected the realtime student: one criterion too many."""
    missed = Criterion(
        kind="quality",
        stratum="unseen",
        threshold=0.75,
        n=24,
        value=0.83,
        lower_bound=0.61,
        method="betting",
        level=0.025,
        p=0.2,
        passed=False,
    )
    found = evidence()
    return found.model_copy(update={"passed": False, "source": "realtime_student", "criteria": (*found.criteria, missed), "candidates": 2})


def job(source: str, rows: int, per_s: float, model: str) -> dict[str, Any]:
    bad = {State.TRUNCATED: rows // 400, State.INVALID: rows // 900, State.REFUSED: 0, State.FAILED: 1}
    seconds, answered = rows / per_s, rows - sum(bad.values())
    usd = 0.09 * (seconds + 12.5) / 3600
    states = {State.ANSWERED: answered, **bad}
    figures = JobFigures(
        rows_per_s=per_s,
        tokens_in=rows * 84.0,
        tokens_out=rows * 21.5,
        tokens_in_per_row=84.0 if source == "teacher" else 38.0,
        tokens_out_per_row=21.5,
        engine_start_s=12.5,
        generate_s=round(seconds, 2),
        usd=round(usd, 6),
        usd_per_million=round(usd / rows * 1e6, 4),
        answered_share=answered / rows,
    )
    counts = JobRows(offered=rows, states=states, duplicates=0, reused=0, recomputed=rows, resumed=0)
    return {
        "result": answered_by(model, "sha256:00", source, usd_per_hour=0.09, rows=counts, figures=figures),
        "notes": ("temperature 0 is not batch-invariant: answers were published once, not computed twice",) if source == "teacher" else (),
    }


WITHHELD = (
    WithheldAnswer(
        reason="span_not_in_query",
        query="pizza <script>",
        answer='{"segments":[{"label":"topic","text":"pizza"},{"label":"location","text":"denver"}]}',
        source="teacher",
        count=8200,
    ),
)


def promise() -> CalibrateResult:
    def share(value: float) -> EstimatedShare:
        return EstimatedShare(value=value, low=value - 0.05, high=value + 0.04)

    return CalibrateResult(
        calibration=StudentCalibration(
            receipt="calibrate/f",
            map=ConfidenceMap(method="platt", slope=0.8, intercept=0.3),
            target=0.9,
            delta=0.05,
            threshold=0.8125,
        ),
        verdict="promised",
        source="batch_student",
        student="distill/d",
        digest="d",
        own=CalibrationFigures(ece=0.11, floor=0.05, floor_high=0.07),
        mapped=CalibrationFigures(ece=0.05, floor=0.05, floor_high=0.08),
        figures=EscalationFigures(
            rows_first=120,
            rows=120,
            threshold=0.8125,
            precision=share(0.95),
            escalated=share(0.3),
            usd_per_million=1.2,
            before=share(0.8),
            after=share(0.86),
            gain=share(0.06),
        ),
    )


def published(release: str, snapshot: str, rows: int, coverage: float, student: str = "", **fields: Any) -> PublishResult:
    made = {"release": release, "snapshot": snapshot, "published": rows, "coverage": coverage, "student": student}
    return PublishResult(previous="", figures={}, **made, **fields)


def trained(**fields: Any) -> TrainingTotals:
    return TrainingTotals(examples=2711, steps=600, **fields)


def confidence(ece: float, floor: float, auroc: float, agreement: float | None = None, *gap: float) -> SourceFigures:
    ends = dict(zip(("value", "low", "high"), gap, strict=False))
    known = {"ece": ece, "ece_noise_floor": floor, "auroc": auroc, "agreement": agreement}
    return SourceFigures(**known, minus_teacher=TeacherDifference(**ends) if gap else None)


EVALUATED = EvaluateResult(
    labels="plan/ab:human_labels",
    answers={},
    sources={
        "teacher": confidence(0.021, 0.017, 0.883),
        "batch_student": confidence(0.088, 0.019, 0.842, 0.904, -0.049, -0.071, -0.027),
        "realtime_student": confidence(0.034, 0.02, 0.861, 0.921, -0.017, -0.034, 0.001),
    },
)


def replayed() -> ReplayResult:
    paths = {
        "cache": PathFigures(requests=1424, p50_ms=1.2, p95_ms=2.2, p99_ms=2.9),
        "realtime": PathFigures(requests=548, p50_ms=36.6, p95_ms=60.1, p99_ms=74.3),
        "fallback": PathFigures(requests=28, p50_ms=2001.0, p95_ms=2064.0, p99_ms=2088.0),
    }
    figures = ReplayFigures(
        requests=2000,
        errors=0,
        cache_hit_share=0.712,
        realtime_share=0.274,
        fallback_share=0.014,
        degraded_share=0.014,
        requests_per_s=212.4,
        quality=0.893,
        answered=PathFigures(requests=2000, p50_ms=1.4, p95_ms=52.0, p99_ms=88.0),
        paths=paths,
    )
    return ReplayResult(server=ServedRelease(id="r-0002"), url="http://127.0.0.1:8000", figures=figures)


def example_data(store: Storage, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Receipts of every stage but `leave_out`, written to `store`; their paths by stage."""
    drawn = figures()
    parts: dict[str, dict[str, Any]] = {
        "ingest": {
            "result": IngestResult(
                totals=LogTotals(events=100_000, queries=21_480, holdout_events=10_000, human_labels=420, unseen_share_holdout_events=0.174)
            )
        },
        "plan": {
            "result": PlanResult(
                head_limit="coverage",
                head_last_count=9,
                figures=PlanFigures(
                    head_rows=1200,
                    human_labels=420,
                    head_coverage=0.503,
                    head_coverage_holdout=0.489,
                    seen_coverage_holdout=0.826,
                    zipf_exponent=1.04,
                ),
                forecasts=(HeadForecast(horizon_days=7, value=0.486, low=0.461, high=0.511),),
            ),
            "notes": ("holdout traffic is one day; a week would say more",),
        },
        "precompute_teacher": job("teacher", 3620, 61.5, "example:teacher"),
        "publish_head": {
            "result": published("r-0001", "g-0001", 1197, 0.502),
        },
        "evaluate_teacher": {"result": EVALUATED, "tables": {"quality": quality_table(("teacher", "fallback")), "rows": rows_table()}},
        "curate": {"result": CurateResult(signals={}, training_rows=2711, dropped_rows=909)},
        "distill_batch": {
            "result": DistillResult(
                digest="d",
                base="example:student-base",
                io_format=IOFormat(prompt="query_only", output="compact"),
                training=trained(train_loss=0.0813, eval_loss=0.1127, train_seconds=94.2, trained_params=221_184, params=1_804_032),
            ),
        },
        "precompute_batch": job("batch_student", 18_700, 402.0, "distill/dddddddddddddddd"),
        "evaluate": {
            "tables": {"quality": quality_table(), "rows": rows_table()},
            "figures": {name: drawn[name] for name in ("quality", "calibration")},
            "result": EVALUATED,
            "notes": ("unseen: only 24 labelled rows; its intervals are wide and exact (Clopper-Pearson), not bootstrap",),
        },
        "gate_batch": {
            "result": GateResult(passed=True, evidence=evidence(), candidate_number=1),
            "figures": {"gate": gate_figure(evidence())},
        },
        "publish": {"result": published("r-0002", "g-0002", 21_390, 0.994, "distill/dddd", withheld_answers=2, withheld=WITHHELD)},
        "replay": {
            "result": replayed(),
            "figures": {"latency": drawn["latency"]},
        },
        "distill_realtime": {
            "result": DistillResult(
                digest="e",
                student="encoder",
                training=trained(train_loss=0.0512, eval_loss=0.0731, train_seconds=41.0, trained_params=608_640, params=608_640),
            ),
        },
        "precompute_realtime": job("realtime_student", 420, 4100.0, "distill/0000000000000000"),
        "gate_realtime": {
            "result": GateResult(passed=False, evidence=refused(), candidate_number=2),
            "figures": {"gate": gate_figure(refused())},
        },
        "calibrate": {"result": promise(), "figures": {"calibration": drawn["calibration"]}},
    }
    paths: dict[str, str] = {}
    for number, (name, fields) in enumerate(parts.items()):
        if name not in leave_out:
            kind = name.split("_")[0]
            paths[name] = keep(store, kind, f"{'abcdef0123456789'[number]}" * 16, number, paths, **fields)
    return paths


def keep(
    store: Storage,
    stage: str,
    mark: str,
    number: int,
    before: Mapping[str, str],
    tables: Mapping[str, pa.Table] | None = None,
    figures: Mapping[str, Any] | None = None,
    **fields: Any,
) -> str:
    """One receipt with its outputs; returns its path."""
    path = f"{stage}/{mark}"
    outputs = {name: write_table(store, f"{path}/{name}.parquet", table) for name, table in (tables or {}).items()}
    for name, figure in (figures or {}).items():
        data = charts.svg(figure).encode()
        store.replace(f"{path}/{name}.svg", data)
        outputs[f"{name}.svg"] = FileRef(path=f"{path}/{name}.svg", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    made = Receipt(
        stage=stage,
        fingerprint=mark * 2,
        path=path,
        started=f"2030-01-01T00:{number:02d}:00+00:00",
        seconds=3.5 + number,
        outputs=outputs,
        inputs=dict(list(before.items())[-2:]),
        task="query_segmentation",
        run_id=mark * 2,
        **fields,
    )
    write_json(store, f"{path}/receipt.json", made.model_dump(mode="json"))
    return path


def made(store: Storage, root: str, leave_out: tuple[str, ...] = (), **fields: Any) -> tuple[Receipt[report.Result], dict[str, Any], str]:
    """(receipt, summary, page) of a report over the hand-made run."""
    receipt = report.run(report.Config(root=root, tracking=OFF, receipts=example_data(store, leave_out), title="Quickstart", **fields))
    return receipt, read_json(store, receipt.output("summary").path), store.read(receipt.output("report").path).decode()


def same_as_file(name: str, text: str) -> None:
    """Equal to the file in tests/expected; HEADTAIL_WRITE_EXPECTED=1 writes it anew, to be read before it is committed."""
    path = EXPECTED / name
    if os.environ.get("HEADTAIL_WRITE_EXPECTED"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def printed(summary: Summary) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"), color_system=None, legacy_windows=False)  # noqa: SIM115
    console.print(report.summary_table(summary))
    console.file.close()
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def test_summary_is_the_expected_one(store: Storage, root: str) -> None:
    _, summary, _ = made(store, root, reused=("ingest",))
    assert summary.pop("paths").keys() == {"report", "receipts"}
    summary.pop("headtail")
    same_as_file("report_summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def test_table_is_the_expected_one(store: Storage, root: str) -> None:
    receipt, _, _ = made(store, root)
    same_as_file("report_table.txt", printed(receipt.result.summary))


def test_a_narrow_terminal_crops_no_figure(store: Storage, root: str) -> None:
    receipt, _, _ = made(store, root)
    shown = Console(width=80, record=True, file=open(os.devnull, "w"), color_system=None)  # noqa: SIM115
    shown.print(report.summary_table(receipt.result.summary, shown.width))
    shown.file.close()
    text = shown.export_text()
    assert "…" not in text
    assert "±" not in text
    quality = [source.quality["all"] for source in receipt.result.summary.columns]
    row = next(line for line in text.splitlines() if re.match(r"all +420 ", line))
    shown_ends = re.findall(r"(\d\.\d{3}) ([.\d]{3})-([.\d]{3})", row)
    assert len(shown_ends) == 4
    for (value, low, high), figure in zip(shown_ends, quality, strict=True):
        assert figure.value is not None
        assert figure.low is not None
        assert figure.high is not None
        assert float(value) == round(figure.value, 3)
        assert float(low) <= figure.low < float(low) + 0.01, "each end on its own side, never beyond 0 and 1"
        assert float(high) - 0.01 < figure.high <= float(high)
        assert float(high) <= 1


def test_a_lopsided_interval_has_both_its_ends() -> None:
    """0.961 with 0.864 and 0.989 is no ±97, which would reach 1.058."""
    figure = QualityFigure(value=0.961, low=0.864, high=0.989)
    assert terminal._quality(figure, wide=False) == "0.961 .86-.99"
    assert terminal._quality(figure, wide=True) == "0.961 [0.864, 0.989]"
    assert terminal._quality(QualityFigure(value=1.0, low=0.99, high=1.0), wide=False) == "1.000 .99-1.0"
    assert terminal._quality(QualityFigure(value=0.0, low=0.0, high=0.031), wide=False) == "0.000 .00-.04"


def test_table_of_a_head_only_run(store: Storage, root: str) -> None:
    receipt, summary, _ = made(store, root, ("curate", "distill_batch", "precompute_batch", "evaluate", "publish", "replay", *REALTIME))
    same_as_file("report_table_head_only.txt", printed(receipt.result.summary))
    assert summary["quality_teacher_all"] == 0.917  # from evaluate_teacher
    assert summary["not_run"] == ["curate", "distill_batch", "precompute_batch", "evaluate", "publish", "replay"]
    assert summary["usd_per_million_batch_student"] is None


def test_every_name_is_documented(store: Storage, root: str) -> None:
    _, summary, _ = made(store, root)
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    known = [re.sub(r"<\w+>", "(.+)", name) for name in re.findall(r"^\| `([^`]+)`", text, flags=re.M)]
    missing = [name for name in summary if not any(re.fullmatch(pattern, name) for pattern in known)]
    assert not missing


class Page(HTMLParser):
    """What a page holds: ids, loads, text, and whether its tags nest."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.anchors: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "poster", "action"):
                (self.anchors if (value or "").startswith("#") else self.loads).append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("leave_out", [(), ("evaluate", "replay"), tuple(s for s in REPORTED_STAGES if s != "plan")])
def test_page_stands_alone_and_is_whole(store: Storage, root: str, leave_out: tuple[str, ...]) -> None:
    _, _, text = made(store, root, leave_out)
    page = Page(text)
    assert page.open == []  # every tag was closed in order
    assert page.loads == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert not set(page.tags) & {"script", "link", "iframe", "img", "object", "embed"}
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert {a[1:] for a in page.anchors} <= set(page.ids)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    for name in set(leave_out) - set(REALTIME):  # a pipeline with one student lacks nothing
        assert f"{name} not run" in page.text


def test_page_says_what_matters(store: Storage, root: str) -> None:
    _, summary, text = made(store, root, reused=("ingest",))
    shown = Page(text).text
    assert text.count("<svg") == 6
    for words in (
        "71.2 %",
        "Of the holdout traffic, 71.2 % was answered from the cache, 27.4 % by the realtime student and 1.4 % by the fallback.",
        "the teacher scores 0.92 (0.90 to 0.94)",
        "On the same queries the batch student is 0.05 below the teacher (difference -0.07 to -0.03).",
        "small placeholder that ships with headtail",
        "it does not say whether either is right, and is not a quality figure",
        "Few labelled rows in unseen (24)",
        "precompute/" + "c" * 8,
        "reused",
        "holdout traffic is one day; a week would say more",
        "Guardrails withheld 2 answers from the cache",
        "Of the batch student's answers with a confidence of at least 0.812, 90 % are right, with at least 95 % confidence",
        "right of all misses: 80.0% without, 86.0% with escalation (+6.0 points, +1.0 to +10.0)",
        "Withheld by guardrails (2 answers, 1 shown)",
        "topic: pizza, location: denver",
        "span not in query",
    ):
        assert words in shown
    assert all(line in shown for line in summary["headline"])
    assert "✗" not in summary["headline"]
    assert shown.index("Student right, teacher wrong") < shown.index("dentist open sunday") < shown.index("Teacher right, student wrong")
    assert shown.index("starbuks") < shown.index("joes barber shop queens")  # by traffic
    assert "(truncated)" in shown
    assert "plumber near me" not in shown  # both right


def test_no_text_of_users_can_write_html(store: Storage, root: str) -> None:
    """Every text in every receipt, each with what ends an element, an attribute and a script: titles, models, notes, inputs, versions."""
    paths = example_data(store)
    for path in paths.values():
        kept = read_json(store, f"{path}/receipt.json")
        notes = [*kept["notes"], "</title></style></td><script>alert(2)</script>\" onload='alert(2)' <img src=x onerror=alert(2)>"]
        result = kept["result"]
        if "model" in result:
            result["model"]["name"] = notes[-1]
        inputs = {**kept["inputs"], notes[-1]: notes[-1]}
        write_json(store, f"{path}/receipt.json", {**kept, "notes": notes, "result": result, "inputs": inputs})
    receipt = report.run(report.Config(root=root, tracking=OFF, receipts=paths, title="</title><script>alert(2)</script>"))
    text = store.read(receipt.output("report").path).decode()
    assert "alert(2)" in text
    page = Page(text)
    assert not {"script", "img"}.intersection(page.tags)
    assert page.open == []
    assert "<script" not in text


def test_queries_cannot_write_html(store: Storage, root: str) -> None:
    _, _, text = made(store, root)
    assert "<script" not in text
    assert "default-src 'none'" in text.partition("<title>")[0]  # a figure of the store that held a script would not run it
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;" in text


def test_rerun_does_nothing_and_figures_decide(store: Storage, root: str) -> None:
    first, _, _ = made(store, root)
    again, _, _ = made(store, root)
    assert again.reused
    assert made(store, root, ("replay",))[0].fingerprint != first.fingerprint


def test_nothing_to_report_on(root: str) -> None:
    with pytest.raises(InputError, match="nothing to report on"):
        report.run(report.Config(root=root, tracking=OFF))
    with pytest.raises(InputError, match="no finished plan here"):
        report.run(report.Config(root=root, tracking=OFF, receipts={"plan": "plan/none"}))


def changed(summary: Summary, sources: Mapping[str, Any]) -> Summary:
    held = {name: source.model_copy(update=sources.get(name, {})) for name, source in summary.sources.items()}
    return summary.model_copy(update={"sources": held})


def test_headline_does_not_flatter() -> None:
    """A dearer student, a difference that is none, and shares that round to nothing are said as they are."""
    none = summarise({}, [], "empty")
    assert list(headline(none)) == []
    dearer: dict[str, dict[str, Any]] = {
        "teacher": {"job": BatchFigures(usd_per_million=1.0)},
        "batch_student": {"job": BatchFigures(usd_per_million=2.0), "cost_ratio": 0.5},
    }
    said = list(headline(changed(none, dearer)))
    assert said == ["A million queries cost USD 1.00 with the teacher and USD 2.00 with the batch student: 2.0 times more."]
    close = {"batch_student": {"minus_teacher": QualityFigure(value=-0.01, low=-0.03, high=0.01)}}
    assert "no difference of batch student and teacher is shown" in next(iter(headline(changed(none, close))))
    rare = PipelineFigures(coverage_holdout_traffic=0.7, cache_hit_share=0.7, realtime_share=0.298, fallback_share=0.002)
    assert "0.2 % by the fallback" in next(iter(headline(none.model_copy(update={"figures": rare}))))


EDGE = AnswerSource(
    name="edge_student", role="student", colour="#123456", dark="#abcdef", marker="v", terminal="green", optional=True, without="no edge"
)


def test_an_optional_source_that_did_not_run_is_nowhere(store: Storage, root: str) -> None:
    """Whatever its place in the table: only its flag decides."""
    for sources in ((*SOURCES, EDGE), (EDGE, *SOURCES), (*SOURCES[:2], EDGE, *SOURCES[2:])):
        none = summarise({}, [], "t", sources=sources)
        assert none.shown == ("teacher", "batch_student", "fallback")
        assert not [name for name in none.not_run if "edge" in name or "realtime" in name]
    needed = EDGE.model_copy(update={"optional": False})
    assert {"distill_edge", "precompute_edge", "gate_edge"} <= set(summarise({}, [], "t", sources=(*SOURCES, needed)).not_run)


def test_another_source_is_a_row_of_the_table(store: Storage, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns, figures, stages, colours and sentences follow, in every part of the report; nothing else of it changes."""
    sources = (*SOURCES[:3], EDGE, SOURCES[3])
    before, paths = made(store, root), example_data(store)
    own = {
        "distill_edge": {"result": DistillResult(digest="f", training=trained(train_loss=0.1, eval_loss=0.2, train_seconds=9.0, params=7))},
        "precompute_edge": job("edge_student", 420, 999.0, "distill/ffffffffffffffff"),
        "gate_edge": {"result": GateResult(passed=True, evidence=evidence(), candidate_number=3)},
    }
    for number, (name, fields) in enumerate(own.items()):
        paths[name] = keep(store, name.split("_")[0], f"{'123'[number]}e" * 8, 20 + number, paths, **fields)
    receipts = {name: stage._load(store, path) for name, path in paths.items()}
    scored = receipts["evaluate"].result
    assert isinstance(scored, EvaluateResult)
    more = scored.model_copy(update={"sources": {**scored.sources, EDGE.name: confidence(0.05, 0.02, 0.8, 0.9, -0.1, -0.2, -0.05)}})
    receipts["evaluate"] = receipts["evaluate"].model_copy(update={"result": more})
    lines = quality_table().to_pylist()
    lines += [{**line, "source": EDGE.name, "quality": 0.777} for line in lines if line["source"] == "realtime_student"]
    summary = summarise(receipts, lines, "Quickstart", sources=sources)
    assert summary.shown == tuple(source.name for source in sources)
    assert [step.stage for step in summary.lineage if "edge" in step.stage] == ["distill_edge", "precompute_edge", "gate_edge"]
    assert stages_of(sources).index("precompute_edge") < stages_of(sources).index("evaluate")
    text = render(store, receipts, summary)
    page = Page(text)
    assert page.open == []
    assert text.count("--edge_student: #123456;") == 2  # on paper and in print
    assert "--edge_student: #abcdef;" in text
    assert page.text.count("edge student") >= 9  # cards, tables, sentences
    assert "the edge student scores 0.78" in page.text
    assert "edge student : passed" in page.text
    terminal = printed(summary)
    assert "Gate: the edge student passed, 2 of 2 criteria passed." in terminal
    assert re.search(r"rows in +3,620 +18,700 +420 +420", terminal)
    assert "edge student" in note.release_note(receipts, "t", "r", "p", sources)
    assert "| edge student | no edge |" in note.release_note(
        {name: one for name, one in receipts.items() if "edge" not in name}, "t", "r", "p", sources
    )
    flat, former = report.flat_summary(summary), before[1]
    assert flat["gate_edge_passed"] is True
    assert flat["train_loss_edge_student"] == 0.1
    own_names = {name for name in flat if "edge" in name}
    assert {name.replace("edge", "realtime") for name in own_names} == {name for name in flat if re.search("realtime(?!_share)", name)} - {
        "latency_realtime_p50_ms",
        "latency_realtime_p95_ms",
        "latency_realtime_p99_ms",
        "requests_realtime",
    }
    changes = {"sources", "lineage", "headline", "paths", "notes"}
    assert {name: flat[name] for name in former.keys() - changes} == {name: former[name] for name in former.keys() - changes}


def test_a_run_of_an_earlier_version_is_named(store: Storage, root: str) -> None:
    """Its figures are null, and a note says why: not as if it had none."""
    receipts = {name: stage._load(store, path) for name, path in example_data(store).items()}
    old = receipts["precompute_teacher"].result.model_copy(update={"figures": None, "rows": None})
    receipts["precompute_teacher"] = receipts["precompute_teacher"].model_copy(update={"result": old})
    summary = summarise(receipts, [], "t")
    assert (summary.teacher.job.model, summary.teacher.job.usd_per_million) == ("example:teacher", None)
    assert [text for text in summary.remarks if text.startswith("precompute_teacher: an earlier version of headtail made this run")]


def test_plain_answers() -> None:
    assert answer_text('{"intent":"browse"}') == "browse"
    assert answer_text('{"segments":[{"label":"topic","text":"pizza"},{"label":"location","text":"nyc"}]}') == "topic: pizza, location: nyc"
    assert answer_text('{"segments":[]}') == "(nothing)"
    assert answer_text('{"a":[1,2],"b":{"c":null}}') == "a: 1, 2; b: None"
    assert len(answer_text(json.dumps({"a": "x" * 999}))) == 160


def test_s3(s3_root: str) -> None:
    from headtail.adapters.storage import open_storage

    receipt, summary, _ = made(open_storage(s3_root), s3_root)
    assert open_storage(s3_root).exists(summary["paths"]["report"])
    assert receipt.rows["stages"] == 16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Debian package chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_real_browser_shows_it(store: Storage, root: str, tmp_path: Path, scheme: str) -> None:
    """Chromium draws the page without a network; its DOM holds the figures, and its picture is not blank."""
    receipt, _, _ = made(store, root)
    page, shot = Path(store.full(receipt.output("report").path)), tmp_path / "page.png"
    base = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    base += ["--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1", "--window-size=1100,7200"]
    base += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    subprocess.run([*base, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=limit(120))
    dom = subprocess.run([*base, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=limit(120), text=True).stdout
    assert dom.count("<svg") == 6
    assert "Lineage" in dom
    import matplotlib.image

    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (7200, 1100)
    assert (pixels.mean() > 0.5) == (scheme == "light")
    for source in ("teacher", "batch_student"):  # the sources' colours are on the page, in the theme's shade
        shade = {"light": charts.COLOURS[source], "dark": {"teacher": "#56b4e9", "batch_student": "#ff8b3d"}[source]}[scheme]
        wanted = np.array([int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert int((np.abs(pixels - wanted).max(axis=2) < 0.02).sum()) > 200
