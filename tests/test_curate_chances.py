"""Suspects' scores, fitted to people's verdicts: the map, its weights, its reliability, and the queue that comes out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from bench.suspect_reviews import review_first, two_queues, with_confidence
from bench.suspects import OFF, example_answers
from conftest import answered_by, keep
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.rows import HUMAN_LABELS
from headtail.core.task import Task, load_task
from headtail.review.log import DecisionLog
from headtail.stages import curate
from headtail.stages.curate import chances
from headtail.stages.curate.chances import describe_scores, fit_chances, why_unfitted
from headtail.stages.curate.reviewed import Reviewed, read_reviewed
from headtail.stages.curate.suspects import ScoreCurve, queue_order
from headtail.stages.precompute.result import Result as PrecomputeResult

pytestmark = pytest.mark.usefixtures("not_drawn")

BADLY_SCALED = ScoreCurve(0.0)  # the scores that are given without verdicts: expit(evidence)


def reviews(n: int, slope: float, seed: int = 0, at_random: float = 0.1, stands_for: float = 1.0) -> Reviewed:
    """Verdicts on rows whose true chance of being wrong is expit(slope * evidence - 1)."""
    rng = np.random.default_rng(seed)
    evidence = np.sort(rng.normal(0, 3, n))
    drawn = rng.random(n) < at_random
    return Reviewed(evidence, rng.random(n) < expit(slope * evidence - 1), drawn, np.where(drawn, stands_for, 1.0), 0)


def test_chances_come_near_the_truth_as_verdicts_come_in() -> None:
    at = np.linspace(-5, 5, 60)
    truth = expit(0.3 * at - 1)
    unfitted = float(np.abs(BADLY_SCALED(at) - truth).mean())
    far = [float(np.abs(fit_chances(reviews(n, 0.3), BADLY_SCALED).apply(at) - truth).mean()) for n in (100, 1000, 10_000)]
    assert far[0] < unfitted
    assert far[2] < far[1] < far[0]
    assert far[2] < 0.03
    chance = fit_chances(reviews(200, 0.3), BADLY_SCALED).apply(np.linspace(-50, 50, 500))
    assert (np.diff(chance) >= -1e-12).all(), "more evidence, no smaller chance"
    assert 0 < chance.min() < chance.max() < 1


def test_a_slice_that_stands_for_many_counts_but_does_not_drown_the_rest() -> None:
    """Chosen rows say 80 % wrong, rows drawn at random, each for 500 others, say 0 %: of the same evidence the truth is between."""
    wrong = np.array([True] * 64 + [False] * 16 + [False] * 8)
    drawn = np.arange(88) >= 80
    alike = Reviewed(np.zeros(88), wrong, drawn, np.where(drawn, 500.0, 1.0), 0)
    even = float(fit_chances(alike._replace(stands_for=np.ones(88)), BADLY_SCALED).apply(np.zeros(1))[0])
    trimmed = float(fit_chances(alike, BADLY_SCALED).apply(np.zeros(1))[0])
    assert trimmed < even - 0.15
    assert trimmed > 0.4, "untrimmed the slice would leave 0.36"


def test_too_few_verdicts_or_of_one_kind_are_not_fitted() -> None:
    few = reviews(chances.LEAST - 1, 1.0)
    enough = reviews(chances.LEAST, 1.0)
    assert f"{chances.LEAST} are needed" in why_unfitted(few)
    assert not why_unfitted(enough)
    assert why_unfitted(enough._replace(wrong=np.zeros(chances.LEAST, bool)))
    told = describe_scores(few, BADLY_SCALED, 0)
    assert (told.fitted, told.random_rows, told.verdicts) == (False, None, chances.LEAST - 1)


def test_reliability_is_of_rows_that_the_fit_did_not_see() -> None:
    """Where evidence says nothing, a fit that judged itself would look better than a constant; folds do not."""
    told = describe_scores(reviews(2000, 0.3, at_random=0.3), BADLY_SCALED, 0)
    assert told.random_rows is not None
    assert told.chosen_rows is not None
    assert told.random_rows.n + told.chosen_rows.n == told.verdicts == 2000
    for kind in (told.random_rows, told.chosen_rows):
        assert kind.brier < kind.brier_unfitted
        assert kind.ece < 3 * kind.ece_floor
        assert sum(part.n for part in kind.bins) == kind.n
        assert all(part.low <= part.wrong <= part.high for part in kind.bins)
    blind = [reviews(60, 0.0, seed) for seed in range(40)]
    kinds = [describe_scores(found, ScoreCurve(-1.0), 0) for found in blind if not why_unfitted(found)]
    brier = [kind.chosen_rows.brier for kind in kinds if kind.chosen_rows]
    assert np.mean(brier) > expit(-1.0) * expit(1.0) - 0.005, "nobody predicts what nothing says better than its variance"


def test_any_first_part_of_the_queue_has_its_random_rows() -> None:
    gain, lot = np.linspace(1000, 1, 1000), np.random.default_rng(0).random(1000)
    may = np.ones(1000, bool)
    may[:3] = False
    order = queue_order(gain, may, np.arange(1000), 200, 0.1, lot)
    assert order.frame == 997
    assert len(set(order.rows.tolist())) == 200
    assert [int(order.at_random[:part].sum()) for part in (10, 50, 100, 200)] == [1, 5, 10, 20]
    assert set(order.rows[order.at_random].tolist()) == set((np.argsort(lot[3:])[:20] + 3).tolist())
    chosen = order.rows[~order.at_random]
    assert (np.diff(gain[chosen]) < 0).all()
    drawn_at_all = np.zeros(1000)
    for seed in range(300):
        again = queue_order(gain, may, np.arange(1000), 200, 0.1, np.random.default_rng(seed).random(1000))
        drawn_at_all[again.rows[again.at_random]] += 1
    first, last = drawn_at_all[3:500].mean(), drawn_at_all[500:].mean()
    assert first == pytest.approx(last, rel=0.1), "rows of high and of low gain alike"
    assert not queue_order(gain, may, np.arange(1000), 200, 0.0, lot).at_random.any()
    assert len(queue_order(gain, may, np.arange(5), 200, 0.1, lot).rows) == 5


@pytest.fixture
def config(store: Storage, segmentation: Task) -> curate.Config:
    """800 answers, a tenth of them wrong in a way that the signals see."""
    answers = example_answers(segmentation, 800).to_pylist()
    for row in answers[::10]:
        row["answer"] = segmentation.dump({"segments": [{"text": "lighthouse", "label": "time"}]})
    table = example_answers(segmentation, 1).schema.empty_table().from_pylist(answers, schema=example_answers(segmentation, 1).schema)
    keep(store, "precompute", "t" * 16, {"answers/shard-00000": table}, task_fingerprint=segmentation.fingerprint, result=answered_by())
    keep(store, "plan", "p" * 16, {"human_labels": HUMAN_LABELS.empty_table()})
    return curate.Config(root=store.root, tracking=OFF, min_gain=0)


def test_curate_reads_the_verdicts_on_its_queue(store: Storage, segmentation: Task, config: curate.Config) -> None:
    first = curate.run(config)
    assert first.result.scores is not None
    assert not first.result.scores.fitted
    assert any("not fitted" in note for note in first.notes)
    queue = output_table(store, first, "suspects")
    right = {
        row["query_key"]: segmentation.dump({"segments": [{"text": row["query"], "label": "topic"}]})
        for row in queue.to_pylist()
        if "lighthouse" in row["answer"]
    }
    review_first(store, segmentation, first, right, 100)
    model = load_receipt(store, "precompute", "precompute", PrecomputeResult).result.model.digest
    found = read_reviewed(store, segmentation, model)
    head = queue.slice(0, 100)
    assert sorted(found.evidence.tolist()) == sorted(head["evidence"].to_pylist()), "the evidence that the answer had in the queue"
    assert found.wrong.sum() == sum(key in right for key in head["query_key"].to_pylist())
    assert found.at_random.sum() == 10
    lesser = found.stands_for > 1
    least = min(gain for gain, drawn in zip(head["gain"].to_pylist(), head["drawn_from"].to_pylist(), strict=True) if drawn is None)
    above = int((queue["gain"].to_numpy() >= least).sum())
    assert found.stands_for[lesser] == pytest.approx(np.full(lesser.sum(), (800 - above) / lesser.sum()))
    assert read_reviewed(store, segmentation, "another model").left_out == 100
    second = curate.run(config)
    scores = second.result.scores
    assert scores is not None
    assert (scores.fitted, scores.verdicts, scores.at_random, scores.left_out) == (True, 100, 10, 0)
    assert scores.random_rows is not None
    assert second.metrics["suspects_fitted"] == 1
    assert curate.run(config).reused, "the same verdicts, the same run"
    rows = output_table(store, second, "suspects").to_pylist()
    assert all(row["gain"] == pytest.approx(row["score"] * max(row["count"], 1), rel=1e-5) for row in rows)
    assert not {row["query_key"] for row in rows} & set(head["query_key"].to_pylist())
    ignored = curate.run(config.model_copy(update={"reviews": False}))
    assert ignored.fingerprint == first.fingerprint


def test_decisions_of_other_queues_are_counted_and_not_used(store: Storage, segmentation: Task, config: curate.Config) -> None:
    receipt = curate.run(config)
    review_first(store, segmentation, receipt, {}, 10)
    kept = DecisionLog(store, segmentation.name).current_decisions()[0].decision
    DecisionLog(store, segmentation.name).record([kept], "page", "feedback/" + "a" * 16 + ":suspects")
    DecisionLog(store, segmentation.name).record([kept._replace(query_key=b"x" * 16)], "import:csv:old", "")
    model = load_receipt(store, "precompute", "precompute", PrecomputeResult).result.model.digest
    found = read_reviewed(store, segmentation, model)
    assert (len(found.wrong), found.left_out) == (9, 2)


@pytest.mark.parametrize("confidence", [False, True])
def test_seventy_five_verdicts_make_the_next_rows_better(confidence: bool) -> None:
    """2,000 answers, 5 % wrong: the next 75 rows hold more wrong events than without the fit, and the chances are nearer to the truth
    (docs/benchmarks/2026-12-01-suspects.md has the figures of larger sets)."""
    task = load_task("query_intent")
    answers = example_answers(task, 2000)
    made = [two_queues(task, with_confidence(answers, seed) if confidence else answers, 0.05, seed, 75) for seed in range(2)]
    assert np.mean([found["fitted"] for found in made]) > np.mean([found["unfitted"] for found in made])
    for found in made:
        assert found["expected_wrong"] == pytest.approx(found["wrong_open"], rel=0.35)
        assert found["scores"]["chosen_rows"]["brier"] < found["scores"]["chosen_rows"]["brier_unfitted"]
