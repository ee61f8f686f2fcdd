"""The bound for traffic must be wrong at most as often as it says, whatever the design of the labels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.label_designs import DESIGNS, false_passes
from headtail.core.bounds import share_p
from headtail.core.traffic_proof import traffic_proof


@pytest.mark.parametrize("design", DESIGNS)
def test_a_claim_that_is_just_false_rarely_passes(design: str) -> None:
    passes = false_passes(design, 1.05, 500, 200)
    assert stats.binomtest(round(200 * passes), 200, 0.05, alternative="greater").pvalue > 1e-4


def test_a_head_that_is_better_than_the_tail_is_no_proof_without_a_design() -> None:
    """Rows by rank, head 0.98, tail 0.6, as if they were the traffic of the tail: what an unknown design allows. So it is refused."""
    rng = np.random.default_rng(0)
    right = rng.random((500, 400)) < np.where(rng.random((500, 400)) < 0.7, 0.98, 0.6)  # someone took 70 % of the rows from the head
    truth = 0.3 * 0.98 + 0.7 * 0.6  # the traffic is 30 % head
    assert (share_p(right.sum(1), 400, truth) <= 0.05).mean() > 0.9


def test_known_rows_are_not_bet_on() -> None:
    certain = np.full(50, 0.02)
    proof = traffic_proof(np.ones(50), certain, np.zeros(50), 0.0, np.arange(50), 0.05)
    assert (proof.p(0.99), proof.low(0.05), proof.value, proof.n) == (0.0, 1.0, 1.0, 50)
    assert traffic_proof(np.zeros(50), certain, np.zeros(50), 0.0, np.arange(50), 0.05).p(0.5) == 1.0


def test_what_no_row_stands_for_counts_as_wrong() -> None:
    drawn = np.full(200, 0.8 / 200)
    proof = traffic_proof(np.ones(200), np.zeros(200), drawn, 0.2, np.arange(200), 0.05)
    assert proof.low(0.05) < 0.8
    assert proof.low(0.05) > 0.75
    assert proof.value == pytest.approx(1.0)
    assert proof.p(proof.low(0.05)) == pytest.approx(0.05, abs=1e-3)


def test_a_cluster_is_one_bet() -> None:
    """Four rows each with one outcome are worth as much as one."""
    right = (np.random.default_rng(1).random(100) < 0.95).astype(float)
    once = traffic_proof(right, np.zeros(100), np.full(100, 0.01), 0.0, np.arange(100), 0.05)
    four = traffic_proof(np.repeat(right, 4), np.zeros(400), np.full(400, 0.0025), 0.0, np.repeat(np.arange(100), 4), 0.05)
    assert four.n == once.n
    assert four.p(0.8) == pytest.approx(once.p(0.8))
