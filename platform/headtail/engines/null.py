"""The null engine: a minimal valid answer for each row at once, to measure what everything around an engine costs.

In: Requests. Out: Completions whose free texts echo the end of the prompt, so that a row given another's answer shows.
With `model: null:faults` words in the prompt break a row or the engine on purpose; `delay_us=N` waits per row;
`log=FILE` writes a byte per row asked, so that work done twice can be counted where it is done.
Knows nothing of language.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from headtail.engines import Completion, Request
from headtail.errors import ConfigError

_WORDS = ("!exit", "!hang", "!raise", "!fail", "!flaky", "!length", "!refuse", "!text", "!invalid")
_FLAKY_TIMES = 2  # errors before a !flaky row is answered


class NullEngine:
    """Answers without a model. `model`: "null", or "null:" and options `faults`, `delay_us=N`, `log=FILE`, comma-separated."""

    def __init__(self, schema: dict[str, Any] | None, model: str = "null") -> None:
        self.schema = schema or {"type": "string"}
        options = _options(model)
        self.faults, self.delay_s = "faults" in options, int(options.get("delay_us", "0")) / 1e6
        self._log = open(options["log"], "ab", buffering=0) if "log" in options else None  # noqa: SIM115 - closed by close
        self._seen: Counter[str] = Counter()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            text = request.messages[-1]["content"]
            if self._log is not None:
                self._log.write(b".")
            if self.delay_s:
                time.sleep(self.delay_s)
            yield (self._broken(request, text) if self.faults else None) or self._answer(request.id, text)

    def facts(self) -> dict[str, Any]:
        return {"engine": "null", "faults": self.faults, "delay_us": round(self.delay_s * 1e6)}

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _answer(self, row: int, text: str) -> Completion:
        answer = json.dumps(minimal(self.schema, self.schema, text), ensure_ascii=False)
        return Completion(row, answer, "stop", tokens_in=len(text.split()), tokens_out=len(answer.split()))

    def _broken(self, request: Request, text: str) -> Completion | None:
        word = next((word for word in _WORDS if word in text), "")
        if word == "!exit":
            os._exit(137)  # as a GPU driver or the kernel's memory killer would
        if word == "!hang":
            time.sleep(1e6)  # as a deadlock in a GPU library would: no exception, no end
        if word == "!raise":
            raise RuntimeError("the null engine was told to break")
        if word == "!flaky":
            self._seen[text] += 1
            return Completion(request.id, error="told to fail for now", transient=True) if self._seen[text] <= _FLAKY_TIMES else None
        made = {
            "!fail": Completion(request.id, error="told to fail"),
            "!length": Completion(request.id, '{"', "length", 1, 1),
            "!refuse": Completion(request.id, "", "content_filter", 1, 0),
            "!text": Completion(request.id, "Sure! Here is", "stop", 1, 3),
            "!invalid": Completion(request.id, "[]", "stop", 1, 1),
        }
        return made.get(word)


def _options(model: str) -> dict[str, str]:
    found = {}
    for option in filter(None, model.partition("null:")[2].split(",")):
        name, _, value = option.partition("=")
        if not ((name == "faults" and not value) or (name == "delay_us" and value.isdigit()) or (name == "log" and value)):
            raise ConfigError("unknown option of the null engine", where="model.model", value=option, fix="null:faults,delay_us=N,log=FILE")
        found[name] = value
    return found


def minimal(schema: dict[str, Any], root: dict[str, Any], echo: str) -> Any:
    """The smallest value valid under `schema`, with free text filled from the end of `echo`. Lists get one item if they may."""
    if "$ref" in schema:
        node: Any = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            node = node[part]
        return minimal(node, root, echo)
    for group in ("anyOf", "oneOf", "allOf"):
        if schema.get(group):
            return minimal(schema[group][0], root, echo)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object" or "properties" in schema:
        return {name: minimal(child, root, echo) for name, child in (schema.get("properties") or {}).items()}
    if kind == "array":
        count = max(int(schema.get("minItems", 0)), min(1, int(schema.get("maxItems", 1))))
        return [minimal(schema.get("items") or {}, root, echo) for _ in range(count)]
    if kind == "string":
        return echo[-min(len(echo), int(schema.get("maxLength", 200))) :].ljust(int(schema.get("minLength", 0)), "x")
    if kind in ("integer", "number"):
        return schema.get("minimum", 0)
    return False if kind == "boolean" else None
