"""A release becomes current by a promotion: what its evidence says is computed anew from the answers and labels in the store first.

In: the id of a release. Out: the release, which is current now; GateRejected says which criterion its rows do not bear out, and what to do.
Not asked where one goes back (`rollback` must work when labels are gone), nor where a deletion takes a query out of the current release.
`publish` computes the same from the task's folder before it builds. Knows nothing of canaries or servers.
"""

from __future__ import annotations

from headtail.adapters.storage import Storage
from headtail.core.errors import GateRejected
from headtail.core.evidence import FORMER_FORMAT
from headtail.core.score import CODE_KINDS
from headtail.releases.release import Release, current_id, load_release, open_task, promote


def promote_release(store: Storage, release: str) -> Release:
    """Make `release` current. Nothing changes when it is already. GateRejected unless every gate's evidence holds when computed anew."""
    target = load_release(store, release)
    if current_id(store) != target.id:
        _prove_gates(store, target)
    return promote(store, target.id)


def _prove_gates(store: Storage, release: Release) -> None:
    from headtail.releases.proof import recheck  # SciPy, which no process of a server needs until then

    task = open_task(release)
    for gate in release.evidence.gates:
        if gate.format == FORMER_FORMAT:  # what it proved then is not asked again
            continue
        if task.file.score.kind in CODE_KINDS:
            what = f"its answers are scored by code of the task's folder (score: {task.file.score.kind}), which a release does not hold"
            fix = "run the same headtail publish again: it has the folder, computes the evidence anew and promotes"
            raise GateRejected(f"release {release.id} is not promoted: {what}", where=gate.candidate, fix=fix)
        if found := recheck(store, gate, task):
            fix = "run headtail gate, then headtail publish with what it finds; to go back to the release before, headtail rollback"
            raise GateRejected(f"release {release.id} is not promoted: {'; '.join(found)}", where=gate.candidate, fix=fix)
