"""The null engine: a minimal valid answer for each row at once, to measure the cost of everything except an engine.

In: Requests. Out: Completions whose free texts echo the end of the prompt, so that a row given another's answer shows.
With `model: null:faults` words in the prompt break a row or the engine on purpose; `delay_us=N` takes that long per row
and `start_s=N` to start, as a device would; `log=FILE` writes a byte per row asked, so that work done twice can be
counted where it is done. What is constant for a schema is made once. Knows nothing of language.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from json.encoder import encode_basestring
from typing import Any

from headtail.core.errors import ConfigError
from headtail.core.schema import resolve_reference
from headtail.engines.base import Completion, Request

_WORDS = ("!exit", "!hang", "!raise", "!fail", "!flaky", "!length", "!refuse", "!text", "!invalid")
_FLAKY_TIMES = 2  # errors before a !flaky row is answered
_SLEEP_S = 0.001  # shorter sleeps last longer than asked: delays add up until they are worth one
_MARK = "\x00free text\x00"


class NullEngine:
    """Answers without a model. `model`: "null", or "null:" and some of `faults`, `delay_us=N`, `start_s=N`, `log=FILE`, comma-separated."""

    def __init__(self, schema: dict[str, Any] | None, model: str = "null", samples: int = 1) -> None:
        options = _options(model)
        self.faults, self.delay_s, self.samples = "faults" in options, int(options.get("delay_us", "0")) / 1e6, samples
        self._answer = answerer(schema or {"type": "string"})
        self._log = open(options["log"], "ab", buffering=0) if "log" in options else None  # noqa: SIM115 - closed by close
        self._seen: Counter[str] = Counter()
        self._owed_s = 0.0
        time.sleep(float(options.get("start_s", "0")))

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        log, delay, faults, answer, several = self._log, self.delay_s, self.faults, self._answer, self.samples > 1
        for request in requests:
            text = request.messages[-1]["content"]
            if log is not None:
                log.write(b".")
            if delay:
                self._take(delay)
            if faults and "!" in text and (broken := self._faulty_completion(request, text)):
                yield broken
                continue
            said = answer(text)
            made = Completion(request.id, said, "stop", text.count(" ") + 1, said.count(" ") + 1)
            yield replace(made, samples=(replace(made, tokens_in=0),) * (self.samples - 1)) if several else made

    def _take(self, seconds: float) -> None:
        """Let this much time pass, as a mean over rows."""
        self._owed_s += seconds
        if self._owed_s >= _SLEEP_S:
            begun = time.monotonic()
            time.sleep(self._owed_s)
            self._owed_s -= time.monotonic() - begun

    def facts(self) -> dict[str, Any]:
        return {"engine": "null", "faults": self.faults, "delay_us": round(self.delay_s * 1e6), "samples": self.samples}

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _faulty_completion(self, request: Request, text: str) -> Completion | None:
        word = next((word for word in _WORDS if word in text), "")
        if word == "!exit":
            os._exit(137)  # as a GPU driver or the kernel's memory killer would
        if word == "!hang":
            while True:  # as a deadlocked device would
                time.sleep(3600)
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
        number = value.isascii() and value.replace(".", "", 1).isdigit()
        known = {"faults": not value, "delay_us": value.isascii() and value.isdigit(), "start_s": number, "log": bool(value)}
        if not known.get(name):
            fix = "null:faults,delay_us=N,start_s=N,log=FILE"
            raise ConfigError("unknown option of the null engine", where="model.model", value=option, fix=fix)
        found[name] = value
    return found


def answerer(schema: dict[str, Any]) -> Callable[[str], str]:
    """From a prompt to the smallest answer valid under `schema`, as JSON; free text is filled from the prompt's end."""
    room: list[tuple[int, int]] = []

    def mark(least: int, most: int) -> str:
        room.append((least, most))
        return _MARK

    first, *others = json.dumps(_smallest(schema, schema, mark), ensure_ascii=False).split(json.dumps(_MARK))
    if not others:
        return lambda prompt: first

    def answer(prompt: str) -> str:
        said = first
        for (least, most), piece in zip(room, others, strict=True):
            said += encode_basestring(_fit_length(prompt, least, most)) + piece
        return said

    return answer


def _fit_length(text: str, least: int, most: int) -> str:
    return (text[-most:] if most else "").ljust(least, "x")


def _smallest(schema: Mapping[str, Any], root: Mapping[str, Any], text: Callable[[int, int], str]) -> Any:
    schema = resolve_reference(schema, root)
    for group in ("anyOf", "oneOf", "allOf"):
        if schema.get(group):
            return _smallest(schema[group][0], root, text)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object" or "properties" in schema:
        return {name: _smallest(child, root, text) for name, child in (schema.get("properties") or {}).items()}
    if kind == "array":
        first = [_smallest(item, root, text) for item in schema.get("prefixItems", [])]
        count = max(int(schema.get("minItems", 0)), min(1, int(schema.get("maxItems", 1)))) - len(first)
        return [*first, *(_smallest(schema.get("items") or {}, root, text) for _ in range(count))]
    if kind == "string":
        return text(int(schema.get("minLength", 0)), int(schema.get("maxLength", 200)))
    if kind in ("integer", "number"):
        return schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    return False if kind == "boolean" else None
