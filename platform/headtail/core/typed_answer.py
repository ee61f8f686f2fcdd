"""An answer as a person types it, into a file of labels or on the review page: both are read here, so that they are read in the same way.

In: a task and a text. Out: the answer that is meant, valid under the task's schema, or what is wrong with the text. Taken as well
as JSON: the bare label of a task that is scored by label (with or without the quotes of JSON), and a choice in other letters
(`Near_Me` for `near_me`). Nothing else is guessed. A model's answer is never read here: see `Task.parse`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from headtail.core.schema import resolve_reference
from headtail.core.task import Task
from headtail.core.text import normalise

_QUOTES = re.compile("[\u201c-\u201f\u00ab\u00bb]")  # what a spreadsheet or a phone makes of "


def parse_typed_answer(task: Task, text: str) -> tuple[Any, str]:
    """(answer, "") or (None, what is wrong)."""
    text = text.strip()
    answer, problem = _parse_choices(task, text)
    if problem and task.file.score.kind == "label" and not text.startswith("{"):
        answer, problem = _parse_choices(task, json.dumps({task.file.score.field: _bare(text)}))
    if problem.startswith("not JSON") and (mark := _QUOTES.search(text)):
        problem = f'not JSON: it has the quotation mark {mark.group()} where JSON has "; switch "smart quotes" off where it is typed'
    return answer, problem


def _bare(text: str) -> str:
    """The text that a JSON text stands for; anything else as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, str) else text


def _parse_choices(task: Task, text: str) -> tuple[Any, str]:
    """As `Task.parse`; where that fails, once more with choices spelled as the schema spells them."""
    answer, problem = task.parse(text)
    if problem and not problem.startswith("not JSON"):
        return task.parse(json.dumps(_fit(json.loads(text), task.schema, task.schema)))
    return answer, problem


def _fit(value: Any, schema: Any, root: dict[str, Any]) -> Any:
    """`value` with each text that is no choice of its `enum` replaced by the one choice that it is after normalisation."""
    if not isinstance(schema, dict):
        return value
    schema = resolve_reference(schema, root)
    for branch in (branch for group in ("anyOf", "oneOf", "allOf") for branch in schema.get(group) or ()):
        value = _fit(value, branch, root)
    if isinstance(value, dict):
        known = schema.get("properties") or {}
        return {name: _fit(item, known.get(name), root) for name, item in value.items()}
    if isinstance(value, list):
        return [_fit(item, schema.get("items"), root) for item in value]
    choices = [choice for choice in schema.get("enum") or [schema.get("const")] if isinstance(choice, str)]
    if isinstance(value, str) and value not in choices:
        alike = [choice for choice in choices if normalise(choice) == normalise(value)]
        return alike[0] if len(alike) == 1 else value
    return value
