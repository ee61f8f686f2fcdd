"""Review files in Label Studio's JSON: tasks to import there, the labelling config, and its JSON export read back.

    spans  -> regions of the query (type labels); a region's corrected text in a text area per region
    label  -> one choice;  anything else, or spans that are not in the query -> the answer as JSON in a text area

Conventions: https://labelstud.io/guide/task_format and /guide/predictions. An answer is drawn as regions or a choice only if it can be
read back exactly. Knows nothing of the store.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from headtail.core.errors import InputError
from headtail.core.task import Task
from headtail.review.decision import DROP, canonical_answer
from headtail.review.formats import ReviewRow, Sent, value_of

# Names of controls in the labelling config.
TEXT, NOTE, SPANS, FIXED, CHOICE, WHOLE, VERDICT, WHY = "text", "note", "spans", "corrected", "label", "answer", "verdict", "why"


def label_choices(task: Task) -> list[str]:
    """The labels a reviewer chooses from, in the schema's order; empty when the schema does not list them all as text."""
    score = task.file.score
    node = _child(task.schema, score.field, task.schema) if score.kind != "exact" else {}
    if score.kind == "spans":
        node = _child(_resolve(node.get("items"), task.schema), score.label, task.schema)
    values = node.get("enum", [node["const"]] if "const" in node else [])
    return list(values) if all(isinstance(value, str) and value for value in values) else []


def _child(schema: Mapping[str, Any], name: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    return _resolve((schema.get("properties") or {}).get(name), root)


def _resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    for _ in range(16):  # a $ref may lead to another; a ring of them ends here
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            break
        node: Any = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            node = node.get(part, {}) if isinstance(node, Mapping) else {}
        schema = node
    return schema if isinstance(schema, Mapping) else {}


def labelling_config(task: Task) -> str:
    """The labelling config of a project for these tasks, as XML."""
    names, lines = label_choices(task), [f"  <Header value={quoteattr(task.file.description or task.name)}/>"]
    kind = task.file.score.kind
    if names and kind == "spans":
        lines += [f'  <Labels name="{SPANS}" toName="{TEXT}">', *(f"    <Label value={quoteattr(n)}/>" for n in names), "  </Labels>"]
    lines += [f'  <Text name="{TEXT}" value="${TEXT}"/>', f'  <Header value="${NOTE}" size="6"/>']
    if names and kind == "spans":
        lines.append(_area(FIXED, "the text as it should read, if it is not as in the query", ' perRegion="true"'))
    if names and kind == "label":
        choices = (f"    <Choice value={quoteattr(n)}/>" for n in names)
        lines += [f'  <Choices name="{CHOICE}" toName="{TEXT}" choice="single">', *choices, "  </Choices>"]
    lines.append(_area(WHOLE, "the whole answer as JSON, instead of marks", ' rows="3"'))
    lines += [f'  <Choices name="{VERDICT}" toName="{TEXT}" choice="single">', f'    <Choice value="{DROP}"/>', "  </Choices>"]
    lines.append(_area(WHY, "why"))
    return "\n".join(["<View>", *lines, "</View>"]) + "\n"


def _area(name: str, hint: str, more: str = "") -> str:
    return f'  <TextArea name="{name}" toName="{TEXT}" editable="true" maxSubmissions="1" placeholder={quoteattr(hint)}{more}/>'


def write_tasks(rows: Iterable[Sent], queue: str, task: Task) -> Iterator[str]:
    """A JSON array of tasks: the answer is the first prediction, each alternative a further one."""
    separator = "[\n"
    for item, decision in rows:
        data = {
            TEXT: item.query,
            **{name: getattr(item, name) for name in ("rank", "query_key", "answer_key", "stratum", "count", "score", "gain")},
            "before": item.answer,
            NOTE: "; ".join([f"{item.count:,} events", *item.reasons, *(f"{k}: {', '.join(v)}" for k, v in item.side.items() if v)]),
            "queue": queue,
            "decided": f"{decision.verdict} by {decision.who}, {decision.at}" if decision else "",
        }
        answers = [("answer", item.answer), *((f"alternative {i}", text) for i, text in enumerate(item.alternatives, 1))]
        predictions = [
            {
                "model_version": name,
                **({"score": item.confidence} if name == "answer" and item.confidence is not None else {}),
                "result": result_list(task, item.query, text, f"{item.query_key[:12]}.{item.rank}.{i}"),
            }
            for i, (name, text) in enumerate(answers)
            if text is not None
        ]
        yield separator + json.dumps({"data": data, "predictions": predictions}, ensure_ascii=False)
        separator = ",\n"
    yield "\n]\n" if separator != "[\n" else "[]\n"


def result_list(task: Task, query: str, answer: str, mark: str) -> list[dict[str, Any]]:
    """An answer as Label Studio's result list; as marks when they give it back exactly, else as JSON text."""
    drawn = _draw(task, query, value_of(answer), mark)
    if drawn is not None and answer_of(task, query, drawn, answer) == (answer, ""):
        return drawn
    return [_item(f"{mark}.{WHOLE}", WHOLE, "textarea", {"text": [answer]})]


def _item(mark: str, name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": mark, "from_name": name, "to_name": TEXT, "type": kind, "value": value}


def _draw(task: Task, query: str, answer: Any, mark: str) -> list[dict[str, Any]] | None:
    score, names = task.file.score, label_choices(task)
    value = answer.get(score.field) if isinstance(answer, dict) else None
    if score.kind == "label" and value in names:
        return [_item(f"{mark}.{CHOICE}", CHOICE, "choices", {"choices": [value]})]
    if score.kind != "spans" or not names or not isinstance(value, list):
        return None
    texts = [segment.get(score.text) if isinstance(segment, dict) else None for segment in value]
    places = align_texts(query, [text for text in texts if isinstance(text, str)])
    if places is None or len(places) != len(value):
        return None
    drawn = []
    for i, ((start, end), segment) in enumerate(zip(places, value, strict=True)):
        where = {"start": start, "end": end}
        drawn.append(_item(f"{mark}.{i}", SPANS, "labels", {**where, "text": query[start:end], "labels": [segment.get(score.label)]}))
        if query[start:end] != segment[score.text]:
            drawn.append(_item(f"{mark}.{i}", FIXED, "textarea", {**where, "text": [segment[score.text]]}))
    return drawn


def align_texts(query: str, texts: Sequence[str]) -> list[tuple[int, int]] | None:
    """The place of each text in the query, from left to right; None when it is not known.

    A text that is not in the query (its spelling was corrected) gets the words between its neighbours.
    """
    places: list[tuple[int, int] | None] = []
    cursor = 0
    for text in texts:
        if not text.strip():
            return None
        match = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)").search(query, cursor)
        places.append(match.span() if match else None)
        cursor = match.end() if match else cursor
    return _fill(query, texts, places)


def _fill(query: str, texts: Sequence[str], places: list[tuple[int, int] | None]) -> list[tuple[int, int]] | None:
    done: list[tuple[int, int]] = []
    at = 0
    while at < len(places):
        place = places[at]
        if place is not None:
            done.append(place)
            at += 1
            continue
        end = next((i for i in range(at, len(places)) if places[i] is not None), len(places))
        right = places[end][0] if end < len(places) else len(query)  # type: ignore[index]
        left = done[-1][1] if done else 0
        words = [(left + m.start(), left + m.end()) for m in re.finditer(r"\S+", query[left:right])]
        sizes = [len(words)] if end - at == 1 else [len(text.split()) for text in texts[at:end]]
        if not words or sum(sizes) != len(words):
            return None
        for size in sizes:
            done.append((words[0][0], words[size - 1][1]))
            words = words[size:]
        at = end
    return done


def answer_of(task: Task, query: str, marks: Sequence[Mapping[str, Any]], before: str | None) -> tuple[str, str]:
    """(canonical answer, "") that a result list says, or ("", what is wrong). Fields that cannot be marked are kept from `before`."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for mark in marks:
        if isinstance(mark, Mapping) and isinstance(mark.get("value"), Mapping):
            by_name.setdefault(str(mark.get("from_name")), []).append(mark)
    whole = "\n".join(_texts(by_name.get(WHOLE, []))).strip()
    score, drawn = task.file.score, by_name.get(SPANS, []) + by_name.get(CHOICE, [])
    if whole and drawn:
        return "", "there are marks and an answer as JSON: remove one of them"
    if whole:
        text = whole
    elif not drawn:
        return "", "nothing is marked; if that is the answer, write it as JSON"
    else:
        value, problem = _spans(task, query, by_name) if score.kind == "spans" else _label(drawn)
        if problem:
            return "", problem
        kept = json.loads(before) if before else {}
        text = json.dumps({**(kept if isinstance(kept, dict) else {}), score.field: value})
    stored, problem = canonical_answer(task, text)
    return (stored, "") if stored is not None else ("", f"answer: {problem}")


def _texts(marks: Iterable[Mapping[str, Any]]) -> list[str]:
    found: list[str] = []
    for mark in marks:
        text = mark["value"].get("text")
        found += [text] if isinstance(text, str) else [part for part in _listed(mark, "text") if isinstance(part, str)]
    return found


def _listed(mark: Mapping[str, Any], name: str) -> list[Any]:
    """The list under `name` of a mark's value; empty when something else stands there."""
    value = mark["value"].get(name)
    return value if isinstance(value, list) else []


def _label(drawn: Sequence[Mapping[str, Any]]) -> tuple[Any, str]:
    chosen = [choice for mark in drawn for choice in _listed(mark, "choices")]
    return (chosen[0], "") if len(chosen) == 1 else (None, f"{len(chosen)} labels are chosen; one is needed")


def _spans(task: Task, query: str, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Any, str]:
    score = task.file.score
    fixed = {str(mark.get("id")): "".join(_texts([mark])) for mark in by_name.get(FIXED, ())}
    found: list[tuple[int, dict[str, str]]] = []
    for mark in by_name.get(SPANS, ()):
        value, given = mark["value"], _listed(mark, "labels")
        start, end = value.get("start"), value.get("end")
        if not (type(start) is int and type(end) is int):
            return None, "a region without start and end"
        if len(given) != 1:
            return None, f"a region with {len(given)} labels; one is needed"
        text, problem = _region(query, start, end, value.get("text"))
        if problem:
            return None, problem
        found.append((start, {score.text: fixed.get(str(mark.get("id"))) or text, score.label: given[0]}))
    return [segment for _, segment in sorted(found, key=lambda pair: pair[0])], ""


def _region(query: str, start: int, end: int, text: Any) -> tuple[str, str]:
    """(text of a region without blanks at its ends, "") or ("", what is wrong). Older versions counted in UTF-16 units."""
    slices = [query[start:end]] if 0 <= start < end <= len(query) else []
    units = query.encode("utf-16-le", "surrogatepass")
    if 0 <= start < end and 2 * end <= len(units):
        with contextlib.suppress(UnicodeDecodeError):  # it would cut a character in two
            slices.append(units[2 * start : 2 * end].decode("utf-16-le"))
    if text is not None and text not in slices:
        return "", f"a region says {str(text)[:60]!r}, the query has {query[start:end][:60]!r} there"
    if text is None and len(set(slices)) != 1:
        shown = " or ".join(repr(piece[:60]) for piece in slices) or "nothing"
        return "", f"a region without its text, from {start} to {end}: the query has {shown} there"
    found = (slices[0] if text is None else str(text)).strip()
    return (found, "") if found else ("", "a region of blanks alone")


def _blanks_note(values: Sequence[Mapping[str, Any]]) -> str:
    """What to note of regions that were marked with the blanks beside them."""
    texts = [mark["value"].get("text") for mark in values if mark.get("from_name") == SPANS]
    count = sum(isinstance(text, str) and text != text.strip() for text in texts)
    return f"blanks at the ends of {count} region{'s' if count > 1 else ''} were left out" if count else ""


def read_annotations(data: bytes, where: str, task: Task) -> Iterator[ReviewRow]:
    """One row per annotation of a JSON export; a task without one, or whose annotation was skipped, is a row without verdict."""
    try:
        tasks = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=where, fix="export the project as JSON") from None
    if not isinstance(tasks, list) or (tasks and not any(isinstance(t, dict) and isinstance(t.get("data"), dict) for t in tasks)):
        raise InputError("not a list of Label Studio tasks with `data`", where=where, fix="export the project as JSON, not JSON-MIN")
    for number, item in enumerate(tasks, 1):
        yield from _rows(number, item, task)


def _rows(number: int, item: Any, task: Task) -> Iterator[ReviewRow]:
    text = json.dumps(item, ensure_ascii=False)
    data = item.get("data") if isinstance(item, dict) else None
    if not isinstance(data, dict):
        yield ReviewRow(number, text, "no `data`")
        return
    keys = {name: data.get(name) or "" for name in ("query_key", "answer_key", "before", "queue")} | {"query": data.get(TEXT) or ""}
    bad = [name for name, value in keys.items() if not isinstance(value, str)]
    given = item.get("annotations", [])
    if bad or not isinstance(given, list) or not all(isinstance(annotation, dict) for annotation in given):
        yield ReviewRow(number, text, f"{bad[0]}: not text" if bad else "annotations: not a list of annotations")
        return
    made = [annotation for annotation in given if not annotation.get("was_cancelled")]
    for annotation in made:
        yield _row(number, text, annotation, keys, task)
    if not made:
        yield ReviewRow(number, text, **keys)


def _row(number: int, query: str, annotation: Mapping[str, Any], keys: Mapping[str, str], task: Task) -> ReviewRow:
    marks = annotation.get("result") or []
    if not isinstance(marks, list) or not all(isinstance(mark, dict) for mark in marks):
        return ReviewRow(number, query, "annotations: `result` is not a list of marks", **keys)
    values = [mark for mark in marks if isinstance(mark.get("value"), dict)]
    why = "\n".join(_texts(mark for mark in values if mark.get("from_name") == WHY))
    at = annotation.get("updated_at") or annotation.get("created_at") or ""
    row = ReviewRow(number, query, note=_blanks_note(values), **keys, why=why, who=_who(annotation.get("completed_by")), at=str(at))
    if any(DROP in _listed(mark, "choices") for mark in values if mark.get("from_name") == VERDICT):
        return row._replace(verdict=DROP)
    before, _ = canonical_answer(task, keys["before"]) if keys["before"] else (None, "")
    answer, problem = answer_of(task, keys["query"], values, before)
    if problem:
        return row._replace(problem=problem)
    return row._replace(verdict="accept") if answer == before else row._replace(verdict="correct", answer=answer)


def _who(completed_by: Any) -> str:
    """Label Studio says a number, or an object with an e-mail address."""
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("email") or completed_by.get("username") or completed_by.get("id")
    if isinstance(completed_by, str):
        return completed_by
    return f"label studio user {completed_by}" if isinstance(completed_by, int) else ""
