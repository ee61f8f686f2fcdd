"""Of which family a model is, by its name: a judge is kind to answers of its own family, and a student is of its teachers'.

In: names of models, receipts of answers. Out: family names. A name is all that is known of an endpoint's model; where it misleads,
`families` of the judge's config says it. Knows nothing of verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.cache.lineage import find_ancestors
from headtail.core.receipt import Receipt
from headtail.core.rows import Source
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.precompute.result import Result as PrecomputeResult

_ALIASES = {"meta": "llama", "chatgpt": "gpt", "o": "gpt", "gemma": "gemini", "qwq": "qwen"} | dict.fromkeys(
    ("mixtral", "ministral", "magistral", "codestral", "devstral"), "mistral"
)


def model_family(name: str, families: Mapping[str, str]) -> str:
    """The family of a model: `families` by its name, else the first word of the name's last part."""
    if name in families:
        return families[name]
    if name.startswith("example:"):
        return "example"
    last = name.rstrip("/").rpartition("/")[2].lower()
    found = re.match(r"[a-z]+", last)
    word = found.group() if found else last
    return _ALIASES.get(word, word)


def answer_families(store: Storage, answers: Receipt[PrecomputeResult], families: Mapping[str, str]) -> tuple[str, ...]:
    """The families of the model that answered; of a student, of what it started from and of the teachers that it learnt from."""
    name = answers.result.model.name
    if not name.startswith("distill/"):
        return (model_family(name, families),)
    student = load_receipt(store, "distill", name, DistillResult)
    names = [student.result.base] if student.result.base else []
    for found in find_ancestors(store, student.inputs, "precompute"):
        taught = load_receipt(store, "precompute", found.path, PrecomputeResult).result
        names += [taught.model.name] if taught.source == Source.TEACHER else []
    return tuple(dict.fromkeys(model_family(each, families) for each in names))
