"""What is taken for what: wanted label against given label, with examples, for tasks that label a query or its spans. Pure but for drawing.

In: SCORED rows. Out: CONFUSION rows and a picture. Of a query's spans first those with text and label the same are paired, then those with
the same text, then those that share words (`moved`: the span has other bounds). What is left was missed, or is not wanted.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headtail.adapters import charts
from headtail.core.rows import Source
from headtail.core.score import ScoreConfig
from headtail.core.task import Task
from headtail.core.text import normalise
from headtail.stages.base import Stage

MISSED, EXTRA = "(nothing given)", "(nothing wanted)"
EXAMPLES = 3  # queries of a cell, the most frequent ones
_SIDE = 12  # labels that the picture shows, the most frequent ones
CONFUSION = pa.schema(
    [
        ("source", pa.string()),
        ("wanted", pa.string()),  # label; EXTRA where nothing was wanted
        ("given", pa.string()),  # label; MISSED where nothing was given
        ("n", pa.int64()),  # labels or spans
        ("moved", pa.int64()),  # of them: spans that share words but not their bounds
        ("examples", pa.list_(pa.string())),  # query: wanted text > given text
    ]
)
Span = tuple[str, str]  # label, text


def write_confusion(stage: Stage, task: Task, rows: pa.Table) -> None:
    """Table and picture of the answer sources' confusions; nothing for a task that gives no labels."""
    if task.file.score.kind not in ("label", "spans"):
        return
    found = list(confusion_rows(task.file.score, rows.to_pylist()))
    stage.table("confusion", pa.Table.from_pylist(found, schema=CONFUSION))
    stage.figure("confusion", confusion_figure([line for line in found if line["source"] != Source.FALLBACK]))


def confusion_rows(score: ScoreConfig, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """CONFUSION rows of SCORED rows, by source; the most frequent cells first."""
    cells: dict[tuple[str, str, str], list[tuple[int, str, bool]]] = defaultdict(list)
    for row in rows:
        wanted = spans_of(score, json.loads(row["wanted"]))
        given = spans_of(score, json.loads(row["given"])) if row["given"] is not None else []
        for want, got in pair_spans(wanted, given):
            text = f"{want[1] if want else ''} > {got[1] if got else ''}" if score.kind == "spans" else ""
            moved = bool(want and got and want[1] != got[1])
            cell = row["source"], want[0] if want else EXTRA, got[0] if got else MISSED
            cells[cell].append((row["count"] or 0, f"{row['query']}: {text}" if text else row["query"], moved))
    order = {source: place for place, source in enumerate(dict.fromkeys(row["source"] for row in rows))}
    for (source, want_label, got_label), found in sorted(cells.items(), key=lambda item: (order[item[0][0]], -len(item[1]), item[0])):
        examples = [text for _, text, _ in sorted(found, key=lambda each: (-each[0], each[1]))]
        line = {"source": source, "wanted": want_label, "given": got_label, "n": len(found), "moved": sum(moved for *_, moved in found)}
        yield {**line, "examples": list(dict.fromkeys(examples))[:EXAMPLES]}


def spans_of(score: ScoreConfig, answer: Any) -> list[Span]:
    """The labels of an answer with their text, in order; of a label task the one label."""
    value = answer.get(score.field) if isinstance(answer, dict) else None
    if score.kind == "label":
        return [] if value is None else [(str(value), "")]
    segments = value if isinstance(value, list) else []
    found = [(str(each.get(score.label)), normalise(str(each.get(score.text)))) for each in segments if isinstance(each, dict)]
    return [(label, text) for label, text in found if label not in score.without]


def pair_spans(wanted: Sequence[Span], given: Sequence[Span]) -> Iterator[tuple[Span | None, Span | None]]:
    """Each span once, with the one that it most likely stands for."""
    left, right = list(wanted), list(given)
    for alike in (lambda a, b: a == b, lambda a, b: a[1] == b[1], lambda a, b: bool(_shared(a, b))):
        for want in list(left):
            fits = [got for got in right if alike(want, got)]
            if fits:
                got = max(fits, key=lambda each: _shared(want, each))
                left.remove(want)
                right.remove(got)
                yield want, got
    yield from ((want, None) for want in left)
    yield from ((None, got) for got in right)


def _shared(one: Span, other: Span) -> int:
    return sum((Counter(one[1].split()) & Counter(other[1].split())).values())


def confusion_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A panel per answer source: wanted labels down, given ones across, share of the wanted in each cell."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure, panels = charts.blank(4.2 * max(1, len(sources)), 3.8, ncols=max(1, len(sources)), squeeze=False)
    for axes, source in zip(panels[0], sources, strict=False):
        mine = [row for row in rows if row["source"] == source]
        weight = Counter[str]()
        for row in mine:
            weight.update({row["wanted"]: row["n"], row["given"]: row["n"]})
        shown = [label for label, _ in weight.most_common() if label not in (MISSED, EXTRA)][:_SIDE]
        down, across = [*shown, EXTRA], [*shown, MISSED]
        counts = np.zeros((len(down), len(across)))
        for row in mine:
            if row["wanted"] in down and row["given"] in across:
                counts[down.index(row["wanted"]), across.index(row["given"])] = row["n"]
        axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), count in np.ndenumerate(counts):
            if count:
                dark = count / counts[i].sum() > 0.6
                axes.text(j, i, f"{int(count):,}", ha="center", va="center", fontsize=8, color=charts.PAPER if dark else charts.INK)
        axes.set_xticks(range(len(across)), across, rotation=45, ha="right")
        axes.set_yticks(range(len(down)), down)
        axes.set_xlabel(f"{source}: given")
        axes.set_ylabel("wanted")
    return figure
