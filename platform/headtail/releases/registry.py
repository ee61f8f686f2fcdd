"""Students in MLflow's registry.

In: a student's receipt, the gate's evidence, the release. Out: a model version; `champion` moves on the gate's evidence alone, which
is kept with the version. Knows nothing of how students are made.
"""

from __future__ import annotations

from headtail.adapters.progress import say
from headtail.adapters.storage import open_storage
from headtail.adapters.tracking import Tracker
from headtail.core.errors import GateRejected
from headtail.core.evidence import Evidence
from headtail.core.receipt import Receipt
from headtail.core.task import Task
from headtail.releases.proof import recheck


def register_student(
    tracker: Tracker, root: str, *, task: Task, source: str, student: Receipt, base: str, gate: str, evidence: Evidence | None, release: str
) -> None:
    """Register a student as a model version of its task and answer source, and promote it if the gate's evidence allows it.

    `base`: what it was distilled from. `gate`: the gate's receipt; empty without human labels. `release`: id of the release it is in.
    The evidence is computed anew from the answers and labels that it names, under the task's policy.
    """
    store, name = open_storage(root), f"headtail-{task.name}-{source}"
    tags = {"fingerprint": student.fingerprint, "path": student.path, "release": release}
    described = f"{base} distilled for {task.name}; gate: {gate or 'none: no human labels'}"
    address = store.uri(f"{student.path}/model")
    version = tracker.model_version(name, address, student.run_id, tags, described)
    try:
        tracker.promote(name, version, evidence or {}, recheck(store, evidence, task) if evidence else ())
    except GateRejected as rejection:
        tracker.challenge(name, version)
        say(f"registry     {rejection.what}")
