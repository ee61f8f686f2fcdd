"""Students in MLflow's registry.

In: a student's receipt, the gate's, the release's. Out: a model version; `champion` moves on the gate's evidence alone, which
is kept with the version. Knows nothing of how students are made.
"""

from __future__ import annotations

from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage
from headtail.adapters.tracking import Tracker
from headtail.core.errors import GateRejected
from headtail.core.receipt import Receipt


def register_student(
    tracker: Tracker, root: str, *, task: str, source: str, student: Receipt, gated: Receipt | None, published: Receipt
) -> None:
    """Register a student as a model version of its task and answer source, and promote it if the gate's evidence allows it."""
    name = f"headtail-{task}-{source}"
    tags = {"fingerprint": student.fingerprint, "path": student.path, "release": str(published.facts.get("release", ""))}
    described = f"{student.facts.get('base')} distilled for {task}; gate: {gated.path if gated else 'none: no human labels'}"
    address = open_storage(root).uri(f"{student.path}/model")
    version = tracker.model_version(name, address, student.run_id, tags, described)
    try:
        tracker.promote(name, version, gated.facts["evidence"] if gated else {})
    except GateRejected as rejection:
        tracker.challenge(name, version)
        say(f"registry     {rejection.what}")
