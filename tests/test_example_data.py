"""The example data: the same from the same seed, shaped as asked, right by construction, bounded in memory."""

from __future__ import annotations

import collections
import resource

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.suspects import asked
from headtail.adapters.storage import open_storage, read_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import TrackingConfig, result_fields
from headtail.core.keys import normalise, query_key
from headtail.core.receipt import LATEST
from headtail.core.task import load_task
from headtail.examples import example_data

OFF = TrackingConfig(enabled=False)


def events(config: example_data.Config) -> pa.Table:
    return pa.concat_tables(table for _, table in example_data.log_tables(config))


def test_same_seed_same_bytes_other_seed_other_data(tmp_path: object) -> None:
    small = example_data.Config(events=3000, days=3)
    assert events(small).equals(events(small))
    assert not events(small).equals(events(small.model_copy(update={"seed": 8})))


def test_events_days_and_schema() -> None:
    table = events(example_data.Config(events=10_001, days=4))
    assert table.num_rows == 10_001
    assert table.schema == example_data.LOG
    assert sorted(collections.Counter(table["time"].to_pylist()).values()) == [2500, 2500, 2500, 2501]


@pytest.mark.parametrize("exponent", [0.8, 1.05, 1.4])
def test_frequencies_follow_the_exponent(exponent: float) -> None:
    draws = example_data._Draws(example_data.Config(universe=5000, exponent=exponent, unseen_share=0, typo_share=0))
    counts = np.bincount(draws.take(400_000) // example_data.VARIANTS, minlength=5000)
    ranks = np.arange(5, 200)
    slope = np.polyfit(np.log(ranks), np.log(counts[ranks - 1]), 1)[0]
    assert abs(-slope - exponent) < 0.05


def test_asked_is_the_log_counted() -> None:
    config = example_data.Config(events=4000, days=3)
    counted = collections.Counter(events(config)["query"].to_pylist())
    found: collections.Counter[str] = collections.Counter()
    counts = []
    for text, _, n, _ in asked(config):
        found[text] += n
        counts.append(n)
    assert found == counted
    assert counts == sorted(counts, reverse=True)


def test_share_never_seen_before() -> None:
    config = example_data.Config(events=60_000, days=6, unseen_share=0.1)
    seen: set[str] = set()
    shares = []
    by_day: dict[int, list[str]] = collections.defaultdict(list)
    for day, table in example_data.log_tables(config):
        by_day[day] += table["query"].to_pylist()
    for day in range(6):
        fresh = [q for q in by_day[day] if q not in seen]
        shares.append(len(fresh) / len(by_day[day]))
        seen.update(by_day[day])
    assert all(share >= 0.09 for share in shares[1:]), shares
    assert shares[-1] < 0.3


def test_drift_replaces_a_share_of_the_recurring_meanings_each_day() -> None:
    """After ten days at 10 % about 0.9 ** 10 = 35 % of the first day's traffic is left; without drift nothing else changes."""
    config = example_data.Config(events=110_000, days=11, universe=2000, unseen_share=0, typo_share=0, exponent=0.8)
    left, first = {}, np.zeros(0)
    for drift in (0.0, 0.1):
        draws = example_data._Draws(config.model_copy(update={"drift": drift}))
        days = []
        for day in range(config.days):
            draws.start_day(day)
            days.append(draws.take(10_000))
        left[drift] = float(np.isin(days[-1], np.arange(2000) * example_data.VARIANTS).mean())
        first = days[0] if not drift else first
        assert np.array_equal(days[0], first)
    assert left[0.0] == 1.0
    assert 0.30 < left[0.1] < 0.40


def test_one_text_has_one_right_answer() -> None:
    known: dict[str, tuple[object, str]] = {}
    for rank in range(20_000):
        found = example_data.meaning(7, rank, 40_000)
        held = known.setdefault(found.text, (found.segments, found.intent))
        if any(text in example_data.vocabulary()["ambiguous"] for text, _ in found.segments):
            continue  # its parts may be told apart by side inputs only
        assert held == (found.segments, found.intent), found.text


@given(st.integers(0, 10**7), st.integers(0, example_data.VARIANTS - 1))
def test_answers_fit_their_tasks(rank: int, variant: int) -> None:
    found = example_data.meaning(7, rank, 40_000)
    text = example_data.misspell(found.text, variant)
    assert abs(len(text) - len(found.text)) <= 1
    for name in ("query_segmentation", "query_intent"):
        task = load_task(name)
        assert task.parse(task.dump(example_data.right_answers(found)[name]))[1] == ""
    assert " ".join(s["text"] for s in example_data.right_answers(found)["query_segmentation"]["segments"]) == found.text


def test_names_are_among_the_businesses_viewed() -> None:
    for rank in range(2000):
        found = example_data.meaning(7, rank, 40_000)
        names = [text for text, label in found.segments if label == "name"]
        assert not names or names[0] in found.businesses


def test_side_inputs_for_the_head_only() -> None:
    config = example_data.Config(events=20_000, side_input_ranks=50)
    table = events(config)
    known = {q for q, b in zip(table["query"].to_pylist(), table["businesses"].to_pylist(), strict=True) if b}
    assert 0 < len(known) < 50 * example_data.VARIANTS + 1


def test_training_rows_share_no_query_with_any_human_labels(root: str) -> None:
    config = example_data.Config(root=root, tracking=OFF, events=2000, days=2, seed=1, train=3000, labels=800, avoid_labels_seed=7)
    receipt = example_data.run(config)
    store = open_storage(root)
    keys = set(output_table(store, receipt, "train_query_segmentation")["query_key"].to_pylist())
    for seed in (1, 7):
        labels = {
            query_key(normalise(text))
            for text, _, _ in example_data.sample(config.model_copy(update={"seed": seed}), 800, example_data.LABELS_SALT)
        }
        assert not keys & labels
    assert len(keys) > 2000


def test_stage_writes_a_file_a_day(root: str) -> None:
    receipt = example_data.run(example_data.Config(root=root, tracking=OFF, events=5000, days=3, labels=50))
    store = open_storage(root)
    assert sum(read_table(store, receipt.outputs[f"log/day-{d:02d}"].path).num_rows for d in range(3)) == 5000
    assert receipt.output("human_labels_query_segmentation").rows == 50
    assert example_data.run(example_data.Config(root=root, tracking=OFF, events=5000, days=3, labels=50)).reused
    found = load_receipt(store, "example-data", LATEST, example_data.Result).result.data
    assert result_fields(found) == result_fields(example_data.Config(events=5000, days=3, labels=50))  # enough to draw the same again


@pytest.mark.slow
def test_millions_of_events_in_bounded_memory(root: str) -> None:
    config = example_data.Config(root=root, tracking=OFF, events=1_500_000, universe=150_000, labels=10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    receipt = example_data.run(config)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert receipt.rows["events"] == 1_500_000
    assert grown_mib < 500, f"memory grew by {grown_mib:.0f} MiB"
