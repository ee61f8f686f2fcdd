"""Turn the SNIPS and CLINC150 folders, as published, into a log and a file of labels that `make quickstart` takes.

    python docs/benchmarks/real_data/prepare.py snips   path/to/snips    build/real/snips
    python docs/benchmarks/real_data/prepare.py clinc150 path/to/clinc150 build/real/clinc150
    python docs/benchmarks/real_data/prepare.py snips_intents path/to/snips build/real/snips_intents 400 300 1500

The three numbers draw (seed 0) that many training answers, test answers and texts of the log; the log has no text of the training answers.
The texts and labels are people's. Neither set is a log, so how often each text is asked is drawn here from a Zipf law
(exponent 1.05, seed 0): coverage figures on it say nothing about real traffic, quality figures do.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EVENTS = 200_000
Row = tuple[str, Any, str]  # text, answer, split


def snips(folder: Path) -> Iterator[Row]:
    """Slots of the seven intents."""
    for intent in sorted(p for p in folder.iterdir() if p.is_dir()):
        yield from snips_of(intent)


def snips_of(intent: Path) -> Iterator[Row]:
    """Slots of one intent's texts; one of the files is Latin-1."""
    files = (("train", f"train_{intent.name}_full.json"), ("test", f"validate_{intent.name}.json"))
    for split, name in files:
        raw = (intent / name).read_bytes()
        try:
            data = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            data = json.loads(raw.decode("latin-1"))
        for item in data[intent.name]:
            text = "".join(part["text"] for part in item["data"])
            marked = [part for part in item["data"] if "entity" in part]
            slots = [{"text": clean(part["text"]), "label": part["entity"].lower()} for part in marked]
            yield text, {"segments": slots}, split


def snips_intents(folder: Path) -> Iterator[Row]:
    """The intent alone, one of seven."""
    for intent in sorted(p for p in folder.iterdir() if p.is_dir()):
        for text, _, split in snips_of(intent):
            yield text, {"intent": intent.name}, split


def clinc150(folder: Path) -> Iterator[Row]:
    """150 intents and out-of-scope."""
    data = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    for part in ("train", "oos_train", "val", "oos_val", "test", "oos_test"):
        for text, label in data[part]:
            yield text, {"intent": label}, "test" if part.endswith("test") else "train"


def clean(text: str) -> str:
    """As headtail normalises queries, so that a span can be found in its query."""
    return " ".join(text.casefold().split())


def draw(rows: list[Row], train: int, test: int, log: int) -> tuple[list[Row], list[str]]:
    """(rows with answers, texts of the log): the log has all texts of test answers, and none of training answers."""
    rows = list({clean(row[0]): row for row in rows}.values())
    random.Random(0).shuffle(rows)
    answered = [row for row in rows if row[2] == "train"][:train] + [row for row in rows if row[2] == "test"][:test]
    labelled = {row[0] for row in answered}
    tested = [row[0] for row in answered if row[2] == "test"]
    return answered, tested + [row[0] for row in rows if row[0] not in labelled][: log - len(tested)]


def main(kind: str, source: str, target: str, *sizes: str) -> None:
    """Write log.parquet (query, count) and labels.jsonl (query, answer, split); a text of both splits stays in test only."""
    rows = list({"snips": snips, "snips_intents": snips_intents, "clinc150": clinc150}[kind](Path(source)))
    held = {clean(text) for text, _, split in rows if split == "test"}
    rows = [row for row in rows if row[2] == "test" or clean(row[0]) not in held]
    rows, logged = draw(rows, *map(int, sizes)) if sizes else (rows, [text for text, _, _ in rows])
    out = Path(target)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "labels.jsonl").open("w", encoding="utf-8") as file:
        for text, answer, split in rows:
            row = {"query": text, "answer": json.dumps(answer, ensure_ascii=False), "split": split}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    texts = sorted(set(logged))
    random.Random(0).shuffle(texts)
    weights = [rank**-1.05 for rank in range(1, len(texts) + 1)]
    counts = [max(1, round(EVENTS * w / sum(weights))) for w in weights]
    pq.write_table(pa.table({"query": texts, "count": counts}), out / "log.parquet")
    answers = {split: sum(row[2] == split for row in rows) for split in ("train", "test")}
    print(f"{kind}: {len(texts):,} texts, {sum(counts):,} events, {answers['train']:,} train and {answers['test']:,} test answers in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
