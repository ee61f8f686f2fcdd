"""The description of the pipeline's run in MLflow: where each part of the release is. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from headtail.core.receipt import Receipt
from headtail.stages.precompute.result import Result as PrecomputeResult
from headtail.stages.publish import Result as PublishResult
from headtail.stages.report.summary import result_of


def release_note(receipts: Mapping[str, Receipt], task: str, report: str, prompt: str) -> str:
    """A table in Markdown: each part of the release and where it is. `prompt`: its version in MLflow; `report`: the page's address."""
    published, teacher = result_of(receipts, PublishResult, "publish"), result_of(receipts, PrecomputeResult, "precompute_teacher")
    assert published is not None  # a pipeline runs both
    assert teacher is not None
    parts = {
        "release": f"{published.release} (snapshot {published.snapshot})",
        "prompt": f"Prompts: {prompt}",
        "teacher": f"{teacher.model.name}, run precompute_teacher",
        "training set": f"{receipts['curate'].rows.get('training_set', 0):,} rows, {receipts['curate'].path}, run curate",
        "batch student": f"Models: headtail-{task}-batch_student, {receipts['distill_batch'].path}",
        "realtime student": f"Models: headtail-{task}-realtime_student, {receipts['distill_realtime'].path}"
        if "distill_realtime" in receipts
        else "none: the batch student answers misses too",
        "evidence": ", ".join(f"{receipts[name].path}, run {name}" for name in ("gate_batch", "gate_realtime") if name in receipts)
        or "none: no human labels",
        "report": f"artifact report.html here; {report}",
    }
    return "| part | where |\n|---|---|\n" + "\n".join(f"| {name} | {where} |" for name, where in parts.items())
