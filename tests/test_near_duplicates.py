"""Near-duplicates among labels: found by letters, linked into clusters, and one row to whoever reckons with chance."""

from __future__ import annotations

import random

import numpy as np

from headtail.core.bounds import Game, share_p
from headtail.core.near_duplicates import duplicate_clusters


def test_finds_what_is_nearly_the_same() -> None:
    clusters = duplicate_clusters(
        ["cheap flights rome", "rome cheap flights", "cheap flihgts rome", "cheap flights oslo", "cheap hotels rome", "Cheap  Flights Rome"]
    )
    assert clusters.tolist() == [0, 0, 0, 1, 2, 0]


def test_links_reach_over_several() -> None:
    assert len(set(duplicate_clusters(["plumber", "plumbers", "plumberss", "plumbersss"]).tolist())) == 1
    assert duplicate_clusters([]).tolist() == []
    assert duplicate_clusters(["18v drill", "12v drill"]).tolist() == [0, 1]  # numbers are no spelling
    assert duplicate_clusters(["unseen query 11", "unseen query 111"]).tolist() == [0, 1]


def paraphrases(rng: random.Random, number: int) -> list[str]:
    """Four ways to type one query."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=9)) for _ in range(2)]
    at = rng.randrange(1, 8)
    slip = words[0][:at] + words[0][at + 1] + words[0][at] + words[0][at + 2 :]
    return [" ".join(words), " ".join(reversed(words)), f"{slip} {words[1]}", f"{words[0]} {words[1]}s"]


def test_four_ways_to_type_a_query_do_not_pass_more_often() -> None:
    """100 questions, four rows each with one outcome. The exact test on 400 rows passes a false claim 0.2 of the time; on clusters 0.05."""
    rng = random.Random(0)
    rows = [text for number in range(100) for text in paraphrases(rng, number)]
    clusters = duplicate_clusters(rows)
    assert clusters.tolist() == np.repeat(np.arange(100), 4).tolist()
    first = np.unique(clusters, return_index=True)[1]
    right = np.repeat(np.random.default_rng(0).random((4000, 100)) < 0.9, 4, axis=1)  # the claim "above 0.9" is just false
    assert (share_p(right.sum(1), 400, 0.9) <= 0.05).mean() > 0.15
    assert (share_p(right[:, first].sum(1), len(first), 0.9) <= 0.05).mean() <= 0.055
    assert (Game(right[:, first].astype(float), 0.05).ps(0.9) <= 0.05).mean() <= 0.055
