"""The description of the pipeline's run in MLflow: where each part of the release is. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headtail.core.answer_source import SOURCES, AnswerSource
from headtail.core.receipt import Receipt
from headtail.stages.curate import Result as CurateResult
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.publish import Result as PublishResult
from headtail.stages.report.summary import result_of


def release_note(receipts: Mapping[str, Receipt], task: str, report: str, prompt: str, sources: Sequence[AnswerSource] = SOURCES) -> str:
    """A table in Markdown: each part of the release and where it is. `prompt`: its version in MLflow; `report`: the page's address."""
    published, curated = result_of(receipts, PublishResult, "publish"), result_of(receipts, CurateResult, "curate")
    assert published is not None  # a pipeline runs both
    assert curated is not None
    students = [source for source in sources if source.role == "student"]
    gates = [source.stage("gate") for source in students if source.stage("gate") in receipts]
    parts = {
        "release": f"{published.release} (snapshot {published.snapshot})",
        "prompt": f"Prompts: {prompt}",
        **{source.label: _teacher(receipts, source.stage("precompute")) for source in sources if source.role == "teacher"},
        "training set": f"{curated.training_rows or 0:,} rows, {receipts['curate'].path}, run curate",
        **{source.label: _student(receipts, source, task) for source in students},
        "evidence": ", ".join(f"{receipts[name].path}, run {name}" for name in gates) or "none: no human labels",
        "report": f"artifact report.html here; {report}",
    }
    return "| part | where |\n|---|---|\n" + "\n".join(f"| {name} | {where} |" for name, where in parts.items())


def _teacher(receipts: Mapping[str, Receipt], stage: str) -> str:
    answered = result_of(receipts, PrecomputeResult, stage)
    return f"{answered.model.name}, run {stage}" if answered else "none"


def _student(receipts: Mapping[str, Receipt], source: AnswerSource, task: str) -> str:
    trained = receipts.get(source.stage("distill"))
    return f"Models: headtail-{task}-{source.name}, {trained.path}" if trained else source.without
