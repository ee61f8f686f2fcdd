"""What a gate reads: who the candidate is, and whose answers it is compared with.

In: receipts and refs. Out: names and digests. Refuses a candidate other than the one that was scored. Decides nothing.
"""

from __future__ import annotations

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt
from headtail.releases.claim import answers_are_own
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.evaluate.result import Result as EvaluateResult
from headtail.stages.precompute.result import Result as PrecomputeResult


def answers_of(store: Storage, evaluation: Receipt[EvaluateResult], source: str) -> Receipt[PrecomputeResult]:
    """The receipt of the answers that were scored as `source`."""
    named = evaluation.result.answers
    if source not in named:
        fix = f"one of: {', '.join(named)}; or run headtail evaluate: without `answers` it scores each source that was asked the labels"
        raise ConfigError("the evaluation has no answers of this source", where="source", value=f"{source}, {evaluation.path}", fix=fix)
    return load_receipt(store, "precompute", named[source], PrecomputeResult)


def candidate_of(store: Storage, ref: str, answers: Receipt[PrecomputeResult]) -> tuple[str, str, list[str]]:
    """(reference, digest, remarks) of what is to be promoted. ConfigError when the scored answers are not its own."""
    model = answers.result.model
    if not ref:
        return model.name, model.digest, []
    remarks = []
    if ref.startswith("snapshots/"):
        from headtail.cache import read_manifest

        manifest = read_manifest(store, ref.removeprefix("snapshots/"))
        digest = manifest.content
        rest = [path for path in manifest.lineage if path != answers.path]
        remarks = (
            [f"{ref} also holds answers of {', '.join(rest)}, of which this says nothing: gate their answer source too"] if rest else []
        )
    else:
        receipt = load_receipt(store, "distill", ref, DistillResult)
        ref, digest = receipt.path, receipt.result.digest
    if not answers_are_own(store, ref, digest, answers.path, model.digest):
        fix = "evaluate the candidate's own answers, or name the candidate that was evaluated"
        value = f"{ref}; the scored answers {answers.path} are by {model.name}"
        raise ConfigError("the evaluation did not score this candidate", where="candidate", value=value, fix=fix)
    return ref, digest, remarks
