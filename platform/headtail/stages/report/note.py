"""What a reviewer reads first on the loop's page in MLflow: where each part of the release is. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from headtail.core.receipt import Receipt


def about(found: Mapping[str, Receipt], task: str, report: str, prompt: str) -> str:
    """A table in Markdown: each part of the release and where it is. `prompt`: its version in MLflow; `report`: the page's address."""
    published, student = found["publish"], found["distill"]
    parts = {
        "release": f"{published.facts.get('release')} (generation {published.facts.get('generation')})",
        "prompt": f"Prompts: {prompt}",
        "teacher": f"{found['precompute_teacher'].facts['model']['name']}, run precompute_teacher",
        "golden set": f"{found['curate'].rows.get('golden', 0):,} rows, {found['curate'].path}, run curate",
        "student": f"Models: headtail-{task}-student, {student.path}",
        "realtime student": f"Models: headtail-{task}-realtime, {found['distill_realtime'].path}"
        if "distill_realtime" in found
        else "none: the student above answers live",
        "evidence": ", ".join(f"{found[name].path}, run {name}" for name in ("gate", "gate_realtime") if name in found) or "none: no gold",
        "report": f"artifact report.html here; {report}",
    }
    return "| part | where |\n|---|---|\n" + "\n".join(f"| {name} | {where} |" for name, where in parts.items())
