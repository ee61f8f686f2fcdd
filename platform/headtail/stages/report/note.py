"""The description of the pipeline's run in MLflow: where each part of the release is. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from headtail.core.receipt import Receipt


def about(found: Mapping[str, Receipt], task: str, report: str, prompt: str) -> str:
    """A table in Markdown: each part of the release and where it is. `prompt`: its version in MLflow; `report`: the page's address."""
    published, student = found["publish"], found["distill_batch"]
    parts = {
        "release": f"{published.facts.get('release')} (snapshot {published.facts.get('snapshot')})",
        "prompt": f"Prompts: {prompt}",
        "teacher": f"{found['precompute_teacher'].facts['model']['name']}, run precompute_teacher",
        "training set": f"{found['curate'].rows.get('training_set', 0):,} rows, {found['curate'].path}, run curate",
        "batch student": f"Models: headtail-{task}-batch_student, {student.path}",
        "realtime student": f"Models: headtail-{task}-realtime_student, {found['distill_realtime'].path}"
        if "distill_realtime" in found
        else "none: the batch student answers misses too",
        "evidence": ", ".join(f"{found[name].path}, run {name}" for name in ("gate_batch", "gate_realtime") if name in found)
        or "none: no human labels",
        "report": f"artifact report.html here; {report}",
    }
    return "| part | where |\n|---|---|\n" + "\n".join(f"| {name} | {where} |" for name, where in parts.items())
