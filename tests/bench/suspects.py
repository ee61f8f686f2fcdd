"""How many planted label errors the review queue finds, against looking at random.

    python -m tests.bench.suspects [--rows 20000] [--share 0.05] [--snips FOLDER] [--clinc150 FOLDER]

In: the example data's right answers for both tasks, with errors planted; when given, people's answers of SNIPS and CLINC150 as
published. Out: a table and build/bench/suspects.json. Each set goes through curate as a user's would. There are no confidences and no
samples, so that nothing but the answers gives an error away. Random review at 5 % finds 5 % of the errors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headtail.adapters.storage import Storage, open_storage, write_json, write_table
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.keys import normalise, query_key
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import ANSWER, HUMAN_LABELS, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.examples import example_data
from headtail.stages import curate
from headtail.stages.precompute.result import AnsweringModel
from headtail.stages.precompute.result import Result as PrecomputeResult

from . import planted
from .machine import machine

OUT = Path("build/bench/suspects.json")
BUDGET = 0.05  # share of the rows that people look at
OFF = TrackingConfig(enabled=False)
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks" / "real_data"


def asked(config: example_data.Config) -> Iterator[tuple[str, example_data.Meaning, int, bool]]:
    """(query as typed, meaning, events, side inputs known) for every query of the log, the most frequent first.

    Where two meanings are typed alike, each stands for itself: texts may repeat.
    """
    draws, parts = example_data._Draws(config), []
    for day in range(config.days):
        draws.start_day(day)
        count = config.events // config.days + (1 if day < config.events % config.days else 0)
        parts += [draws.take(min(example_data.CHUNK, count - begin)) for begin in range(0, count, example_data.CHUNK)]
    ids, counts = np.unique(np.concatenate(parts), return_counts=True)
    for place in np.lexsort((ids, -counts)).tolist():
        rank, variant = divmod(int(ids[place]), example_data.VARIANTS)
        found = example_data.meaning(config.seed, rank, config.universe)
        yield example_data.misspell(found.text, variant), found, int(counts[place]), rank < config.side_input_ranks


def example_answers(task: Task, rows: int, seed: int = 7) -> pa.Table:
    """The right answer to each of the `rows` most frequent queries of example data."""
    config = example_data.Config(events=rows * 8, seed=seed)
    lines: list[tuple[str, Any, int, list[str]]] = []
    met: set[str] = set()
    for text, found, events, side in asked(config):
        query = normalise(text)
        if query not in met and len(lines) < rows:
            met.add(query)
            lines.append((query, example_data.right_answers(found)[task.name], events, list(found.businesses) if side else []))
    return answers_table(task, lines)


def people_answers(task: Task, kind: str, folder: str, rows: int) -> pa.Table:
    """People's answers of a published set, as docs/benchmarks/real_data/prepare.py reads it; frequencies from a Zipf law."""
    spec = importlib.util.spec_from_file_location("prepare", DOCS / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    found: dict[str, Any] = {}
    for text, answer, split in getattr(prepare, kind)(Path(folder)):
        if split == "train":
            found.setdefault(normalise(text), answer)
    queries = sorted(found, key=query_key)[:rows]
    return answers_table(task, [(q, found[q], max(1, round(len(queries) / (place + 1))), []) for place, q in enumerate(queries)])


def answers_table(task: Task, lines: Iterable[tuple[str, Any, int, list[str]]]) -> pa.Table:
    """ANSWER rows by an answerer that is always right."""
    schema = with_side_inputs(ANSWER, task.side_inputs)
    rows = [
        {
            "query_key": query_key(query),
            "query": query,
            "answer_key": query_key("a" + query),
            "state": "answered",
            "answer": task.dump(answer),
            "count": events,
            "stratum": "tail" if events == 1 else "torso",
            "eval_only": False,
            "source": "teacher",
            **dict.fromkeys(task.side_inputs, side),
        }
        for query, answer, events, side in lines
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def put(store: Storage, stage: str, name: str, table: pa.Table) -> str:
    """A table as a stage's output, by hand."""
    ref = write_table(store, f"{stage}/{'0' * 16}/{name}.parquet", table)
    answered = PrecomputeResult(source="teacher", model=AnsweringModel(name="bench", digest="bench"))
    made = Receipt(
        stage=stage,
        fingerprint="0" * 32,
        path=f"{stage}/{'0' * 16}",
        started="",
        seconds=0,
        outputs={name: ref},
        result=answered if stage == "precompute" else StageResult(),
    )
    write_json(store, f"{made.path}/receipt.json", made.model_dump(mode="json"))
    return made.path


def one(task: Task, where: str, answers: pa.Table, share: float, seed: int) -> dict[str, Any]:
    """Plant, curate, and look at how much of what was planted the queue holds."""
    with tempfile.TemporaryDirectory(prefix="headtail-suspects-") as folder:
        store = open_storage(folder)
        source = put(store, "precompute", "answers/shard-00000", answers)
        labels = f"{put(store, 'plan', 'human_labels', HUMAN_LABELS.empty_table())}:human_labels"
        spoilt = planted.run(planted.Config(root=folder, tracking=OFF, task=str(task.folder), answers=source, share=share, seed=seed))
        truth = output_table(store, spoilt, "planted")
        whole = curate.Suspicion(rows=answers.num_rows, drop_above=1)
        refs = {"task": str(task.folder), "answers": spoilt.path, "labels": labels}
        started, clock = time.monotonic(), time.process_time()
        receipt = curate.run(curate.Config(root=folder, tracking=OFF, **refs, suspicion=whole, min_gain=0))
        seconds, cpu = time.monotonic() - started, time.process_time() - clock
        queue = output_table(store, receipt, "suspects")
    return {
        "set": where,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        **figures(queue, truth),
        "signals": receipt.result.signals,
    }


def figures(queue: pa.Table, truth: pa.Table) -> dict[str, Any]:
    """Precision, recall and lift over random at the budget: by score alone, and by gain as the queue is ranked."""
    wrong = np.isin(np.asarray(queue["query_key"].to_pylist(), dtype=object), np.asarray(truth["query_key"].to_pylist(), dtype=object))
    events, score, gain = (queue[name].to_numpy().astype(float) for name in ("count", "score", "gain"))
    found: dict[str, Any] = {"rows": len(wrong), "wrong": int(wrong.sum()), "wrong_share": float(wrong.mean())}
    found["wrong_share_estimated"] = float(score.mean())
    for name, order in (("score", score), ("gain", gain), ("traffic_only", events)):
        found[name] = at_budget(order, wrong, events)
    first = np.argsort(-score, kind="stable")[: int(BUDGET * len(wrong))]
    top = set(queue["query_key"].take(pa.array(first)).to_pylist())
    planted_as = truth.select(["query_key", "kind"]).to_pylist()
    hit = Counter(row["kind"] for row in planted_as if row["query_key"] in top)
    found["recall_by_kind"] = {kind: hit[kind] / n for kind, n in sorted(Counter(row["kind"] for row in planted_as).items())}
    return found


def at_budget(order: npt.NDArray[np.float64], wrong: npt.NDArray[np.bool_], events: npt.NDArray[np.float64]) -> dict[str, float]:
    """What the first 5 % of the rows by `order` hold. Random review finds the budget's share, of errors and of their events."""
    looked = np.argsort(-order, kind="stable")[: int(BUDGET * len(wrong))]
    precision, recall = float(wrong[looked].mean()), float(wrong[looked].sum() / wrong.sum())
    of_events = float((wrong * events)[looked].sum() / (wrong * events).sum())
    return {
        "precision": precision,
        "recall": recall,
        "times_random": precision / float(wrong.mean()),
        "share_of_wrong_events": of_events,
        "events_times_random": of_events / BUDGET,
    }


def main() -> None:
    """All sets that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--share", type=float, default=0.05, help="of answers that are made wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--snips", help="folder of the SNIPS set as published")
    parser.add_argument("--clinc150", help="folder of the CLINC150 set as published")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    sets: list[tuple[Task, str, pa.Table]] = []
    for name in ("query_segmentation", "query_intent"):
        task = load_task(name)
        sets.append((task, f"example data, {name}", example_answers(task, given.rows)))
    for kind, folder, slots in (("snips", given.snips, "snips_slots"), ("clinc150", given.clinc150, "clinc_intents")):
        if folder:
            task = load_task(DOCS / slots)
            sets.append((task, f"{kind}, people's answers", people_answers(task, kind, folder, given.rows)))
    made = [one(task, where, answers, given.share, given.seed) for task, where, answers in sets]
    print(shown(made))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine(), "budget": BUDGET, "planted_share": given.share, "sets": made}, indent=2) + "\n")


def shown(made: Iterable[Mapping[str, Any]]) -> str:
    """The table for people."""
    lines = ["| set | rows | wrong | precision | recall | times random | by gain: wrong events, times random | by traffic alone | CPU s |"]
    lines += ["|" + "---|" * 9]
    for m in made:
        s, g, t = m["score"], m["gain"], m["traffic_only"]
        by_score = f"{s['precision']:.3f} | {s['recall']:.3f} | {s['times_random']:.1f}"
        by_gain = f"{g['share_of_wrong_events']:.3f}, {g['events_times_random']:.1f} | {t['share_of_wrong_events']:.3f}"
        lines.append(f"| {m['set']} | {m['rows']:,} | {m['wrong']:,} | {by_score} | {by_gain} | {m['cpu_seconds']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
