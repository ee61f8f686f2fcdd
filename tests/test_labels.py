"""`headtail labels`: queries drawn by a design that the labels carry to the evaluation."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import query_key
from headtail.core.label_design import draw_by_traffic
from headtail.core.policy import TaskPolicy
from headtail.review.label_draw import Config, draw_labels, read_draws, traffic_level
from headtail.review.labelling import read_labels
from headtail.stages import ingest, plan

OFF = TrackingConfig(enabled=False)


def test_the_chances_are_those_of_the_draw() -> None:
    rng = np.random.default_rng(0)
    events = np.floor(1000 / np.arange(1, 301)) + 1
    stratum = np.repeat([0, 1, 2], 100)
    drawn, chance = np.zeros(300), np.full(300, np.nan)
    for seed in range(2000):
        found = draw_by_traffic(events, stratum, 10, 60, seed, rng.random(300))
        drawn[found.places] += 1
        chance[found.places] = found.inclusion
        assert len(found.places) == pytest.approx(70, abs=2)
    assert (drawn[:10] == 2000).all()
    fine = ~np.isnan(chance)
    assert drawn[fine] / 2000 == pytest.approx(chance[fine], abs=0.05)
    assert set(found.designs[:10]) == {"census"}


def test_the_level_is_that_of_the_first_look_over_the_criteria() -> None:
    policy = TaskPolicy(minimum={"head": 0.9, "traffic": 0.9}, delta=0.05)
    assert policy.criteria == 4
    assert traffic_level(policy) == pytest.approx(0.05 / 2 / 4)
    assert traffic_level(TaskPolicy(max_drop=None, delta=0.05, looks=5)) == pytest.approx(0.05 / 5 / 2), "traffic would be one more"


def table_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline="")))


def test_labels_are_drawn_filled_in_and_read(tmp_path: Path) -> None:
    root, log = str(tmp_path / "store"), tmp_path / "log.csv"
    words = [f"pizza place {i}" for i in range(200)]
    log.write_text("query\n" + "".join(f"{word}\n" * (1 + 400 // (i + 1)) for i, word in enumerate(words)))
    intake = {"root": root, "tracking": OFF, "task": "query_intent", "log": str(log), "holdout_share": 0.3}
    ingest.run(ingest.Config.model_validate(intake))
    plan.run(plan.Config.model_validate({"root": root, "tracking": OFF, "task": "query_intent"}))
    config = Config(root=root, tracking=OFF, task="query_intent", census=20, rows=40)
    count = draw_labels(config, tmp_path / "draw.csv", "csv")
    lines = table_of(tmp_path / "draw.csv")
    assert all(line["query_key"] == query_key(line["query"]).hex() for line in lines)
    assert len(lines) == count
    assert 45 <= count <= 62  # a stratum may have fewer queries than its part
    census = [line for line in lines if line["design"] == "census"]
    assert sorted(int(line["events"]) for line in census) == sorted(sorted((int(line["events"]) for line in lines), reverse=True)[:20])
    for line in lines:
        line["answer"] = "browse"
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    back = ingest.run(ingest.Config.model_validate({**intake, "labels": str(tmp_path / "labels.csv")}))
    found = output_table(open_storage(root), back, "human_labels")
    designs = dict(zip(found["query"].to_pylist(), found["design"].to_pylist(), strict=True))
    assert designs == {line["query"]: line["design"] for line in lines}
    # and by way of Label Studio
    draw_labels(config, tmp_path / "tasks.json", "labelstudio")
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert (tmp_path / "tasks.xml").exists()
    assert all(item["data"]["query_key"] == query_key(item["data"]["text"]).hex() for item in tasks)
    (draw,) = read_draws(open_storage(root), "query_intent")  # the same queries were drawn twice
    assert {key.hex(): tuple(entry) for key, entry in draw.items()} == {
        line["query_key"]: (line["query"], line["design"], line["stratum"]) for line in lines
    }
    for item in tasks[:-1]:
        item["annotations"] = [{"result": [{"from_name": "label", "value": {"choices": ["browse"]}}]}]
    (tmp_path / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
    report = read_labels(config, tmp_path / "export.json", tmp_path / "read.csv")
    assert (report.rows, report.labels, report.unanswered, report.problems) == (len(tasks), len(tasks) - 1, 1, ())
    left = tasks[-1]["data"]
    expected = {line["query"]: line for line in lines if line["query"] != left["text"]}
    for line in (read := table_of(tmp_path / "read.csv")):
        drawn = expected[line["query"]]
        if (drawn["design"], drawn["stratum"]) != (
            left["design"],
            left["stratum"],
        ):  # beside the query that nobody labelled all stay as drawn
            assert (line["design"], line["inclusion"]) == (drawn["design"], drawn["inclusion"])
        else:
            assert float(line["inclusion"]) < float(drawn["inclusion"])
    assert {line["query"] for line in read} == expected.keys()
    with pytest.raises(InputError, match="this file exists"):
        draw_labels(config, tmp_path / "labels.csv", "csv")  # people's answers are in it
    wide, narrow = (draw_labels(config.model_copy(update={"rows": 0, "width": w}), tmp_path / f"{w}.csv", "csv") for w in (0.2, 0.1))
    assert wide < narrow
    with pytest.raises(ConfigError, match="labels of all queries would not show"):
        draw_labels(Config(root=root, task="query_intent", threshold=0.95), tmp_path / "x.csv", "csv")
