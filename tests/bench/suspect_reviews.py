"""What the first verdicts are worth: how many wrong events the next rows of the review queue hold, with and without the fit to verdicts.

    python -m tests.bench.suspect_reviews [--rows 10000] [--seeds 3] [--reviews 75] [--snips FOLDER] [--clinc150 FOLDER]

Errors are planted in right answers (tests/bench/planted.py), curate makes a queue, a person who knows the right answers reviews its first
rows in its order, curate runs again. Both queues that are compared hold the same open rows and the same rows drawn at random. With
`confidence` the teacher's confidences are random numbers that say nothing, as of a badly calibrated model: then the evidence misleads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.receipt import Receipt
from headtail.core.rows import HUMAN_LABELS, uniform_draw
from headtail.core.task import Task, load_task
from headtail.review.decision import ACCEPT, CORRECT, Decision, current_moment
from headtail.review.log import DecisionLog
from headtail.review.queue import load_queue
from headtail.stages import curate
from headtail.stages.curate.suspects import score_curve

from . import planted
from .machine import machine
from .suspects import DOCS, OFF, example_answers, people_answers, put

OUT = Path("build/bench/suspect_reviews.json")
NEXT = 75  # rows of a queue that are looked at


def with_confidence(answers: pa.Table, seed: int) -> pa.Table:
    """The same answers with confidences between 0.3 and 1 that say nothing."""
    confidence = 0.3 + 0.7 * uniform_draw(answers["query_key"], "confidence", seed)
    return answers.set_column(answers.schema.get_field_index("confidence"), "confidence", pa.array(confidence, pa.float32()))


def review_first(store: Storage, task: Task, receipt: Receipt[Any], right: Mapping[bytes, str], rows: int) -> None:
    """Somebody who knows the right answer to the wrong ones decides on the first `rows` of the queue."""
    queue = load_queue(store, f"{receipt.path}:suspects", task)
    decisions = []
    for item in queue.items(range(rows)):
        key, answer_key = bytes.fromhex(item.query_key), bytes.fromhex(str(item.answer_key))
        verdict, holds = (CORRECT, right[key]) if key in right else (ACCEPT, item.answer)
        decisions.append(Decision(key, item.query, verdict, holds, item.answer, answer_key, "anna", current_moment(), ""))
    DecisionLog(store, task.name).record(decisions, "page", queue.ref)


def two_queues(task: Task, answers: pa.Table, share: float, seed: int, reviews: int) -> dict[str, Any]:
    """Share of the wrong events in the next 75 rows of the queue after `reviews` verdicts, unfitted and fitted; and its reliability."""
    with tempfile.TemporaryDirectory(prefix="headtail-reviews-") as folder:
        store = open_storage(folder)
        source = put(store, "precompute", "answers/shard-00000", answers)
        labels = f"{put(store, 'plan', 'human_labels', HUMAN_LABELS.empty_table())}:human_labels"
        spoilt = planted.run(planted.Config(root=folder, tracking=OFF, task=str(task.folder), answers=source, share=share, seed=seed))
        truth = output_table(store, spoilt, "planted").to_pylist()
        right = {row["query_key"]: row["answer"] for row in truth}
        refs = {"task": str(task.folder), "answers": spoilt.path, "labels": labels}
        whole = curate.Suspicion(rows=answers.num_rows)
        config = curate.Config(root=folder, tracking=OFF, **refs, suspicion=whole, min_confidence=0, min_gain=0, seed=seed)
        first = curate.run(config)
        review_first(store, task, first, right, reviews)
        second = curate.run(config)
        queue = output_table(store, second, "suspects")
        before = found_events(output_table(store, first, "suspects"), right, NEXT)
    scores = second.result.scores
    assert scores is not None
    assert scores.fitted, scores.why
    wrong = np.array([key in right for key in queue["query_key"].to_pylist()], float)
    return {
        "first_queue": before,
        "unfitted": found_events(unfitted(queue, second.metrics["wrong_share_estimated"]), right, NEXT),
        "fitted": found_events(queue, right, NEXT),
        "wrong_open": int(wrong.sum()),
        "expected_wrong": float(np.asarray(queue["score"], float).sum()),
        "scores": scores.model_dump(mode="json"),
    }


def unfitted(queue: pa.Table, wrong_share: float) -> pa.Table:
    """The same queue in the order that it would have without verdicts: the rows drawn at random where they are."""
    evidence, drawn = queue["evidence"].to_numpy(), queue["drawn_from"].is_valid().to_numpy()
    gain = score_curve(evidence, wrong_share)(evidence) * np.maximum(queue["count"].to_numpy(), 1)
    chosen = np.flatnonzero(~drawn)
    order = np.arange(len(drawn))
    order[~drawn] = chosen[np.argsort(-gain[chosen], kind="stable")]
    return queue.take(pa.array(order))


def found_events(queue: pa.Table, right: Mapping[bytes, str], rows: int) -> float:
    """Share of the wrong events of a queue that its first rows hold."""
    wrong = np.array([key in right for key in queue["query_key"].to_pylist()], float) * np.maximum(queue["count"].to_numpy(), 1)
    return float(wrong[:rows].sum() / wrong.sum())


def main() -> None:
    """All sets, each with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reviews", type=int, default=75)
    parser.add_argument("--share", type=float, default=0.05, help="of answers that are made wrong")
    parser.add_argument("--snips", help="folder of the SNIPS set as published")
    parser.add_argument("--clinc150", help="folder of the CLINC150 set as published")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    sets: list[tuple[str, Task, pa.Table]] = []
    for name in ("query_segmentation", "query_intent"):
        task = load_task(name)
        sets.append((f"example data, {name}", task, example_answers(task, given.rows)))
    for kind, folder, slots in (("snips", given.snips, "snips_slots"), ("clinc150", given.clinc150, "clinc_intents")):
        if folder:
            task = load_task(DOCS / slots)
            sets.append((f"{kind}, people's answers", task, people_answers(task, kind, folder, given.rows)))
    made = []
    for where, task, answers in sets:
        for confidence in (False, True):
            for seed in range(given.seeds):
                table = with_confidence(answers, seed) if confidence else answers
                made.append(
                    {"set": where, "confidence": confidence, "seed": seed, **two_queues(task, table, given.share, seed, given.reviews)}
                )
                print({name: value for name, value in made[-1].items() if name != "scores"}, flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"machine": machine(), "reviews": given.reviews, "planted_share": given.share, "sets": made}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
