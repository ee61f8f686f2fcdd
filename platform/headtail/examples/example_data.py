"""Example data: a query log of any size whose right answers are known, made from a seed, with no download.

In: a Config. Out: a Parquet log per day (query, time, businesses), human labels for a sample of queries and, when
asked, rows to train models on. Query frequencies follow a Zipf law with a chosen exponent; every day has a share of
queries never seen before; some are misspelt; some names are also things (only side inputs, known for the head, show which).
The same config gives the same bytes. Written as a stream: memory does not grow with the number of events.
"""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pydantic import Field

from headtail.adapters.progress import progress_bar, say
from headtail.adapters.storage import put
from headtail.core.config import StageConfig, execution, result_fields
from headtail.core.keys import normalise, query_key
from headtail.core.label_design import BY_PROBABILITY
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import DESIGN, TRAINING_SET, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once

VARIANTS = 5  # 0 is the right spelling, 1..4 misspellings, the first the most common
LABELS_SALT = "gold"  # of the draw of human labels: another text draws other labels, and every figure made with them moves
ONCE = 0.2  # share of the labels' tries that look for a query which is asked once only
CHUNK = 250_000  # events per chunk: about 60 MiB
_VARIANT_SHARES = np.cumsum([0.55, 0.25, 0.13, 0.07])
LOG = pa.schema([("query", pa.string()), ("time", pa.date32()), ("businesses", pa.list_(pa.string()))])
EXAMPLE = pa.schema([("query", pa.string()), ("answer", pa.string()), ("businesses", pa.list_(pa.string()))])


class Config(StageConfig):
    """How large the log is and how its traffic is shaped."""

    events: int = Field(200_000, ge=1, description="searches in the log, all days together")
    days: int = Field(8, ge=1, description="days of the log; the events are spread evenly")
    seed: int = Field(7, description="another seed makes other data with the same vocabulary")
    exponent: float = Field(1.05, gt=0, le=3, description="Zipf exponent: frequency of rank r is proportional to r ** -exponent")
    universe: int = Field(40_000, ge=10, description="ranks of the Zipf law: meanings that recur")
    unseen_share: float = Field(0.06, ge=0, lt=1, description="share of each day's events whose query was never asked before")
    drift: float = Field(
        0.0, ge=0, lt=1, description="share of the recurring meanings that new ones replace each day, whatever their rank; 0 for none"
    )
    typo_share: float = Field(0.08, ge=0, lt=1, description="share of events that are misspelt")
    side_input_ranks: int = Field(3_000, ge=0, description="side inputs are known for the most frequent ranks only")
    labels: int = Field(1_500, ge=0, description="queries with a right answer, spread over head, torso, tail and unseen")
    train: int = Field(0, ge=0, description="rows per task to train models on, disjoint from the human labels; 0 for none")
    tasks: tuple[str, ...] = Field(
        ("query_segmentation", "query_intent"), description="tasks (names or folders) for which answers are written"
    )
    avoid_labels_seed: int | None = Field(None, description="keep the labelled queries of this seed's data out of the training rows too")
    start: datetime.date = Field(datetime.date(2026, 1, 5), description="first day")
    label: str = execution("example-data", "name shown in progress lines")


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a person meant: labelled, rightly spelt segments, the intent, and what they looked at afterwards."""

    segments: tuple[tuple[str, str], ...]  # (text, label)
    intent: str
    businesses: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(text for text, _ in self.segments)


@cache
def vocabulary() -> dict[str, list[str]]:
    """The vocabulary, from words.yaml."""
    data = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
    return {name: [str(item) for item in items] for name, items in data.items()}


def _pick(rng: random.Random, name: str) -> str:
    """A word of a list, the first ones more likely (the square of a uniform draw)."""
    items = vocabulary()[name]
    return items[int(len(items) * rng.random() ** 2)]


def _business(rng: random.Random) -> str:
    return f"{_pick(rng, 'name_first')} {_pick(rng, 'name_second')}"


# kind -> (weight, intent); the parts of each kind are in `_parts`
_KINDS: dict[str, tuple[float, str]] = {
    "name": (18, "find_business"),
    "name_place": (14, "find_business"),
    "topic": (12, "browse"),
    "topic_place": (15, "browse"),
    "quality_topic_place": (7, "browse"),
    "topic_near": (9, "near_me"),
    "topic_time": (5, "opening_hours"),
    "name_hours": (4, "opening_hours"),
    "question_topic": (5, "how_to"),
    "price_topic": (4, "price"),
    "topic_delivery": (3, "delivery"),
    "name_delivery": (2, "delivery"),
    "booking": (3, "booking"),
}
_NEW_KINDS = ("name_place", "quality_topic_place", "booking", "name_delivery", "name_hours")  # rich enough to be new each time


def _parts(kind: str, rng: random.Random) -> list[tuple[str, str]]:
    entity = (rng.choice(vocabulary()["ambiguous"]), "?") if rng.random() < 0.08 else None

    def name() -> tuple[str, str]:
        return entity or (_business(rng), "name")

    def topic() -> tuple[str, str]:
        return entity or (_pick(rng, "topics"), "topic")

    def place() -> tuple[str, str]:
        return (_pick(rng, "locations"), "location")

    joined = [(rng.choice(vocabulary()["joiners"]), "none")] if rng.random() < 0.4 else []
    match kind:
        case "name":
            return [name()]
        case "name_place":
            return [name(), *joined, place()]
        case "topic":
            return [topic()]
        case "topic_place":
            return [topic(), *joined, place()]
        case "quality_topic_place":
            return [(_pick(rng, "qualifiers"), "none"), topic(), *joined, place()]
        case "topic_near":
            return [topic(), (_pick(rng, "near"), "location")]
        case "topic_time":
            return [topic(), (_pick(rng, "times"), "time")]
        case "name_hours":
            return [name(), *([place()] if rng.random() < 0.5 else []), (_pick(rng, "hours"), "time")]
        case "question_topic":
            return [(_pick(rng, "questions"), "question"), topic()]
        case "price_topic":
            return [(_pick(rng, "prices"), "question"), topic()]
        case "topic_delivery":
            return [topic(), (_pick(rng, "delivery"), "topic")]
        case "name_delivery":
            return [name(), *([place()] if rng.random() < 0.6 else []), (_pick(rng, "delivery"), "topic")]
        case _:
            return [(_pick(rng, "booking"), "none"), name(), *([place()] if rng.random() < 0.5 else []), (_pick(rng, "times"), "time")]


def meaning(seed: int, rank: int, universe: int) -> Meaning:
    """The meaning behind a rank (0 is the most frequent; `universe` and above: asked once).

    Whether an ambiguous word is a name is a function of the whole text, so that one text has one right answer.
    """
    rng = random.Random(f"{seed}/{rank}")
    kinds = list(_NEW_KINDS) if rank >= universe else list(_KINDS)
    kind = rng.choices(kinds, [_KINDS[k][0] for k in kinds])[0]
    parts = _parts(kind, rng)
    text = " ".join(part for part, _ in parts)
    coin = random.Random(f"{seed}/meaning/{text}").random() < 0.5
    segments = tuple((part, ("name" if coin else "topic") if label == "?" else label) for part, label in parts)
    intent = _KINDS[kind][1]
    if coin and intent == "browse" and any(label == "?" for _, label in parts):
        intent = "find_business"
    elif not coin and intent == "find_business" and any(label == "?" for _, label in parts):
        intent = "browse"
    return Meaning(segments, intent, _businesses(rng, segments))


def _businesses(rng: random.Random, segments: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    names = [text for text, label in segments if label == "name"]
    others = [_business(rng) for _ in range(3 - len(names[:1]))]
    viewed = [*names[:1], *others][: rng.randint(2, 3)]
    rng.shuffle(viewed)
    return tuple(viewed)


def misspell(text: str, variant: int) -> str:
    """`text` with one typing error in one longer word; variant 0, or no such word, is the text itself."""
    if variant == 0:
        return text
    rng = random.Random(f"{text}/{variant}")
    tokens = text.split(" ")
    places = [i for i, token in enumerate(tokens) if len(token) >= 5 and token.isalpha()]
    if not places:
        return text
    at = rng.choice(places)
    word, spot = tokens[at], rng.randrange(1, len(tokens[at]) - 1)
    slip = rng.randrange(4)
    if slip == 0:
        word = word[:spot] + word[spot + 1 :]
    elif slip == 1:
        word = word[:spot] + word[spot + 1] + word[spot] + word[spot + 2 :]
    elif slip == 2:
        word = word[:spot] + word[spot] + word[spot:]
    else:
        word = word[:spot] + rng.choice("aeiou") + word[spot + 1 :]
    tokens[at] = word
    return " ".join(tokens)


_COARSE = {"topic": "what", "name": "what", "location": "where", "time": "when"}


def right_answers(meaning: Meaning) -> dict[str, dict[str, Any]]:
    """The right answer of each task that the example data know, by task name."""
    return {
        "query_segmentation": {"segments": [{"text": text, "label": label} for text, label in meaning.segments]},
        "query_intent": {"intent": meaning.intent},
        "query_correction": {"text": meaning.text},
        "query_chunking": {"segments": [text for text, _ in meaning.segments]},
        "query_tagging": {"segments": [{"text": text, "label": _COARSE.get(label, "other")} for text, label in meaning.segments]},
    }


class _Draws:
    """Vectorised draws of (rank, variant) ids for the events of one log."""

    def __init__(self, config: Config) -> None:
        weights = np.arange(1, config.universe + 1, dtype=np.float64) ** -config.exponent
        self.cumulative = np.cumsum(weights / weights.sum())
        self.config = config
        self.rng = np.random.default_rng(config.seed)
        self.fresh = config.universe  # next rank that was not used yet
        self.meanings = np.arange(config.universe)  # by place in the Zipf law; drift replaces some

    def start_day(self, day: int) -> None:
        """New meanings take the places of a share of the old ones; by draws of their own, so that no drift changes nothing else."""
        if day and self.config.drift:
            replaced = np.flatnonzero(np.random.default_rng([self.config.seed, day]).random(self.config.universe) < self.config.drift)
            self.meanings[replaced] = np.arange(self.fresh, self.fresh + len(replaced))
            self.fresh += len(replaced)

    def take(self, n: int) -> np.ndarray:
        """`n` ids, rank * VARIANTS + variant."""
        ranks = self.meanings[np.searchsorted(self.cumulative, self.rng.random(n)).clip(max=self.config.universe - 1)]
        new = self.rng.random(n) < self.config.unseen_share
        ranks[new] = np.arange(self.fresh, self.fresh + int(new.sum()))
        self.fresh += int(new.sum())
        slipped = self.rng.random(n) < self.config.typo_share
        variants = np.where(slipped, 1 + np.searchsorted(_VARIANT_SHARES, self.rng.random(n)).clip(max=VARIANTS - 2), 0)
        return np.asarray(ranks * VARIANTS + variants, dtype=np.int64)


def log_tables(config: Config) -> Iterator[tuple[int, pa.Table]]:
    """(day index, table of events) in order, at most CHUNK events each."""
    draws = _Draws(config)
    per_day = [config.events // config.days + (1 if d < config.events % config.days else 0) for d in range(config.days)]
    for day, count in enumerate(per_day):
        date = config.start + datetime.timedelta(days=day)
        draws.start_day(day)
        for begin in range(0, count, CHUNK):
            yield day, _events(config, draws.take(min(CHUNK, count - begin)), date)


def _events(config: Config, ids: np.ndarray, date: datetime.date) -> pa.Table:
    distinct, inverse = np.unique(ids, return_inverse=True)
    texts, viewed = [], []
    for item in distinct.tolist():
        rank, variant = divmod(item, VARIANTS)
        found = meaning(config.seed, rank, config.universe)
        texts.append(misspell(found.text, variant))
        viewed.append(list(found.businesses) if rank < config.side_input_ranks else None)
    index = pa.array(inverse)
    return pa.table(
        [pa.array(texts).take(index), pa.array([date] * len(ids), pa.date32()), pa.array(viewed, LOG.field("businesses").type).take(index)],
        schema=LOG,
    )


def sample(config: Config, n: int, salt: str) -> Iterator[tuple[str, Meaning, bool]]:
    """(query as typed, meaning, side inputs known) for `n` distinct queries, ranks spread evenly on a log scale.

    A fifth are asked once only, drawn from those of the last day's kind, so that every stratum is met.
    """
    seen: set[bytes] = set()
    for text, found, side in itertools.islice(label_tries(config, salt), 50 * n + 1000):
        if len(seen) == n:
            break
        key = query_key(normalise(text))
        if key not in seen:
            seen.add(key)
            yield text, found, side


def label_tries(config: Config, salt: str) -> Iterator[tuple[str, Meaning, bool]]:
    """One query after the other, without end, the same ones again and again."""
    rng = random.Random(f"{config.seed}/{salt}")
    last_new = config.universe + int(config.events * config.unseen_share)
    while True:
        once = rng.random() < ONCE
        fresh = (
            int(last_new * (1 + rng.random()))
            if salt.startswith("train")
            else last_new - 1 - int(rng.random() * (last_new - config.universe) / config.days)
        )
        rank = max(fresh, config.universe) if once else int(config.universe ** rng.random()) - 1
        variant = 1 + rng.randrange(VARIANTS - 1) if rng.random() < 2 * config.typo_share else 0
        found = meaning(config.seed, rank, config.universe)
        yield misspell(found.text, variant), found, rank < config.side_input_ranks


class Result(StageResult):
    """What data was made: others draw the same events, meanings and right answers again from this."""

    data: Config = Field(description="size, shape and seed of the traffic")


def run(config: Config) -> Receipt[Result]:
    """Write the data as a stage: outputs `log/day-00` ..., `human_labels_<task>`, and `train_<task>` when asked."""
    return run_once("example-data", Result, config, lambda stage: _work(config, stage), version=3)


def _work(config: Config, stage: Stage) -> Result:
    _write_log(config, stage)
    labels = list(sample(config, config.labels, LABELS_SALT))
    from headtail.examples.label_chances import label_chances  # it needs this module

    chances = label_chances(config, labels)
    for task in map(load_task, config.tasks):
        stage.table(f"human_labels_{task.name}", _labels_table(task, labels, chances))
        if config.train:
            stage.table(f"train_{task.name}", _train_table(config, task))
    stage.rows["events"] = config.events
    stage.rows["human_labels"] = config.labels
    say(f"{config.label:<12} {config.events:,} events over {config.days} days, {config.labels:,} human labels")
    return Result(data=Config.model_validate(result_fields(config)))


def _write_log(config: Config, stage: Stage) -> None:
    import pyarrow.parquet as pq

    with progress_bar(config.label, config.events, "events") as shown:
        writer, open_day, path = None, -1, stage.scratch / "day.parquet"
        rows = 0
        for day, table in log_tables(config):
            if day != open_day:
                _close(stage, writer, path, open_day, rows)
                open_day, rows, path = day, 0, stage.scratch / f"day-{day:02d}.parquet"
                writer = pq.ParquetWriter(path, LOG, compression="zstd")
            assert writer is not None
            writer.write_table(table)
            rows += table.num_rows
            shown.advance(table.num_rows)
        _close(stage, writer, path, open_day, rows)


def _close(stage: Stage, writer: Any, path: Path, day: int, rows: int) -> None:
    if writer is not None:
        writer.close()
        stage.outputs[f"log/day-{day:02d}"] = put(stage.store, path, f"{stage.path}/log/day-{day:02d}.parquet", rows)


def _labels_table(task: Task, labels: list[tuple[str, Meaning, bool]], chances: list[float]) -> pa.Table:
    rows = [(text, task.dump(right_answers(found)[task.name]), list(found.businesses) if side else None) for text, found, side in labels]
    columns = [pa.array(column) for column in zip(*rows, strict=True)] if rows else [[], [], []]
    return pa.table([*columns, [BY_PROBABILITY] * len(rows), pa.array(chances, pa.float64())], schema=pa.schema([*EXAMPLE, *DESIGN]))


def _train_table(config: Config, task: Task) -> pa.Table:
    """TRAINING_SET rows whose queries are in no set of human labels; side inputs are shown on half of the rows."""
    sets = [config] + ([config.model_copy(update={"seed": config.avoid_labels_seed})] if config.avoid_labels_seed is not None else [])
    kept_out = {query_key(normalise(text)) for one in sets for text, _, _ in sample(one, one.labels, LABELS_SALT)}
    rng = random.Random(f"{config.seed}/side")
    rows = []
    for text, found, _ in sample(config, config.train, f"train/{task.name}"):
        query = normalise(text)
        key = query_key(query)
        side = list(found.businesses) if rng.random() < 0.5 else []
        if key not in kept_out:
            rows.append((key, query, task.dump(right_answers(found)[task.name]), 1.0, "tail", "human", None, side))
    schema = with_side_inputs(TRAINING_SET, ["businesses"])
    return pa.table([pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)], schema=schema)
