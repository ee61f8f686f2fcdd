"""A task: what is asked of every query, as a folder with `task.yaml` and `prompt.j2`.

In: a folder (or the name of a shipped example). Out: a Task that renders messages, checks answers and scores them.
A user brings a new task without touching this package. Knows nothing of engines or tables.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jsonschema_rs
from pydantic import BaseModel, Field

from headtail.config import Config, build, read_yaml
from headtail.errors import ConfigError
from headtail.keys import fingerprint
from headtail.score import Counts, ScoreConfig, score

EXAMPLES = Path(__file__).parent / "examples" / "tasks"
QUERY = "$query"  # stands for the query's text in a task's fallback answer


class Sampling(Config):
    """How tokens are drawn."""

    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: smallest set of tokens with this much probability")
    max_tokens: int = Field(128, ge=1, le=32768, description="tokens an answer may have; more is `truncated`")
    seed: int | None = Field(None, description="seed of the sampler; null lets the engine choose")
    n: int = Field(1, ge=1, le=64, description="samples per query; the answer is the one most of them agree on, and all are kept")


class Strata(Config):
    """Where the torso ends."""

    torso_min_count: int = Field(2, ge=1, description="events from which a query outside the head is torso rather than tail")


class TaskFile(Config):
    """The fields of task.yaml."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{1,63}$", description="name of the task: small letters, digits, underscores")
    version: int = Field(1, ge=1, description="for people; keys are made over content, not over this number")
    description: str = Field("", description="one sentence for reports and the model card")
    input: str = Field("query", description="column that holds the query")
    side_inputs: tuple[str, ...] = Field((), description="columns joined to a query and put in the prompt")
    answer: dict[str, Any] | str = Field(description="JSON Schema of an answer, or module:PydanticModel")
    prompt: str = Field("prompt.j2", description="Jinja2 template beside task.yaml with blocks `system` and `user`")
    sampling: Sampling = Field(Sampling(), description="how tokens are drawn")
    score: ScoreConfig = Field(description="how two answers are compared")
    strata: Strata = Field(Strata(), description="where the torso ends")
    fallback: dict[str, Any] = Field(description=f"answer given when nothing else can; {QUERY} stands for the query")


@dataclass(frozen=True)
class Task:
    """A task that has been read and checked. `schema` is plain JSON Schema."""

    file: TaskFile
    folder: Path
    schema: dict[str, Any]
    template: str

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def side_inputs(self) -> tuple[str, ...]:
        return self.file.side_inputs

    @cached_property
    def _jinja(self) -> jinja2.Template:
        return _ENVIRONMENT.from_string(self.template)

    @cached_property
    def _constant(self) -> dict[str, str]:
        """Blocks that use no variable, rendered: most often the system message, the same for all rows."""
        found = {}
        for block in _ENVIRONMENT.parse(self.template).find_all(jinja2.nodes.Block):
            alone = jinja2.nodes.Template(block.body, lineno=1)
            alone.set_environment(_ENVIRONMENT)
            if not jinja2.meta.find_undeclared_variables(alone) and not any(alone.find_all(_IMPURE)):
                found[block.name] = "".join(self._jinja.blocks[block.name](self._jinja.new_context({}))).strip()
        return found

    @cached_property
    def _validator(self) -> Any:
        return jsonschema_rs.Draft202012Validator(self.schema)

    def __getstate__(self) -> dict[str, Any]:  # templates and validators are rebuilt where they are needed
        return {name: getattr(self, name) for name in ("file", "folder", "schema", "template")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def messages(self, query: str, side: Mapping[str, Sequence[str]] | None = None) -> list[dict[str, str]]:
        """The chat messages for one query: system first and the same for all rows, so that its prefix is cached."""
        values: dict[str, Any] = {name: list((side or {}).get(name) or ()) for name in self.side_inputs}
        values["query"] = query
        context = self._jinja.new_context(values)
        blocks, constant = self._jinja.blocks, self._constant
        return [
            {"role": role, "content": constant[role] if role in constant else "".join(blocks[role](context)).strip()}
            for role in ("system", "user")
            if role in blocks
        ]

    def parse(self, text: str) -> tuple[Any, str]:
        """(answer, "") when `text` is JSON valid under the schema, else (None, reason). Nothing is repaired."""
        try:
            answer = json.loads(text, parse_constant=_no_number, parse_float=_finite)
            if "\\u" in text:
                self.dump(answer).encode()
        except UnicodeEncodeError:
            return None, "not JSON: it holds half of a surrogate pair, which is no text and cannot be stored"
        except (ValueError, RecursionError) as error:
            return None, f"not JSON: {error}"
        if self._validator.is_valid(answer):
            return answer, ""
        problem = next(self._validator.iter_errors(answer))
        return None, f"schema: {'/'.join(map(str, problem.instance_path)) or 'answer'}: {problem.message[:200]}"

    def dump(self, answer: Any) -> str:
        """The stored form of a parsed answer: its canonical JSON, as `keys.canonical` makes it."""
        return _CANONICAL.encode(answer)

    def target(self, answer: Any) -> str:
        """The text a model is taught to write: keys in the schema's order with ", " and ": ", as the grammar wants it."""
        return json.dumps(_ordered(answer, self.schema), ensure_ascii=False)

    def fallback(self, query: str) -> Any:
        """The answer given when no model can: schema-valid for every query that fits the schema's bounds."""
        return _substitute(self.file.fallback, query)

    def score(self, wanted: Any, given: Any) -> Counts:
        """Units right, wrong and missed in `given` against `wanted`."""
        return score(self.file.score, wanted, given)

    @cached_property
    def answer_settings(self) -> dict[str, Any]:
        """What of the task changes an answer, besides the rendered messages. The scorer does not."""
        return {"schema": self.schema, "sampling": self.file.sampling.model_dump()}

    @cached_property
    def fingerprint(self) -> str:
        """Over all that changes an answer or its prompt; a change of scorer, strata or description keeps it."""
        return fingerprint({**self.answer_settings, "template": self.template, "side_inputs": list(self.side_inputs), "name": self.name})

    @cached_property
    def score_fingerprint(self) -> str:
        """Over what changes a score."""
        return fingerprint({"score": self.file.score.model_dump(), "fallback": self.file.fallback})


_ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
_IMPURE = (jinja2.nodes.Include, jinja2.nodes.Extends, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Filter, jinja2.nodes.Call)
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return number


def load_task(path: str | Path) -> Task:
    """The task in a folder, or the shipped example of that name. ConfigError names file, field and value."""
    folder = Path(path)
    if not folder.exists() and (EXAMPLES / str(path)).is_dir():
        folder = EXAMPLES / str(path)
    if not (folder / "task.yaml").is_file():
        shipped = ", ".join(sorted(p.name for p in EXAMPLES.iterdir() if p.is_dir()))
        raise ConfigError(
            "no task here: task.yaml not found",
            where=str(folder),
            fix=f"give a folder with task.yaml and prompt.j2, or a shipped example: {shipped}",
        )
    where = str(folder / "task.yaml")
    file = build(TaskFile, read_yaml(folder / "task.yaml"), where)
    template = _read_template(folder / file.prompt)
    task = Task(file, folder.resolve(), _schema(file.answer, folder, where), template)
    _check(task, where)
    return task


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("prompt template not found", where=str(path), fix="task.yaml's `prompt` names a file beside it") from None


def _schema(answer: dict[str, Any] | str, folder: Path, where: str) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    module, _, name = answer.partition(":")
    sys.path.insert(0, str(folder))
    try:
        model = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"field answer: {error}", where=where, value=answer, fix="write module:PydanticModel, the module beside task.yaml or installed"
        ) from error
    finally:
        sys.path.remove(str(folder))
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ConfigError("field answer: not a pydantic model", where=where, value=answer)
    return model.model_json_schema()


def _check(task: Task, where: str) -> None:
    try:
        jsonschema_rs.Draft202012Validator(task.schema)
    except jsonschema_rs.ValidationError as error:
        place = "/".join(map(str, error.instance_path))
        raise ConfigError(f"field answer: not a JSON Schema: {error.message}", where=where, value=place) from None
    except jsonschema_rs.ReferencingError as error:
        raise ConfigError(f"field answer: {error}", where=where, fix="put what $ref names into the schema's own $defs") from None
    for place in _unbounded(task.schema, "answer"):
        raise ConfigError(
            f"field {place}: text needs maxLength, enum or const and a list needs maxItems",
            where=where,
            fix="without a bound a model can write until max_tokens and the row is truncated",
        )
    reserved = {"query"} & set(task.side_inputs)
    if reserved:
        raise ConfigError("field side_inputs: this name is taken", where=where, value=", ".join(reserved))
    try:
        messages = task.messages("a query", {name: ["value"] for name in task.side_inputs})
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"prompt template: {error}",
            where=str(task.folder / task.file.prompt),
            fix=f"it may use query{''.join(', ' + s for s in task.side_inputs)}",
        ) from None
    if not messages or messages[-1]["role"] != "user" or "a query" not in messages[-1]["content"]:
        raise ConfigError("prompt template: needs a block `user` that shows {{ query }}", where=str(task.folder / task.file.prompt))
    _, problem = task.parse(task.dump(task.fallback("a query")))
    if problem:
        raise ConfigError(f"field fallback: not a valid answer: {problem}", where=where, value=task.file.fallback)


def _unbounded(schema: Any, place: str) -> list[str]:
    if not isinstance(schema, dict):
        return []
    found = []
    kind = schema.get("type")
    if kind == "string" and not {"maxLength", "enum", "const", "format"} & schema.keys():
        found.append(place)
    if kind == "array" and "maxItems" not in schema:
        found.append(place)
    for group in ("properties", "$defs"):
        for name, child in (schema.get(group) or {}).items():
            found += _unbounded(child, f"{place}.{name}")
    found += _unbounded(schema.get("items"), f"{place}[]")
    for group in ("anyOf", "oneOf", "allOf"):
        for child in schema.get(group) or ():
            found += _unbounded(child, place)
    return found


def _ordered(answer: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> Any:
    root = schema if root is None else root
    if "$ref" in schema:
        node: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            node = node[part]
        schema = node
    if isinstance(answer, dict):
        known = schema.get("properties") or {}
        names = [n for n in known if n in answer] + [n for n in answer if n not in known]
        return {n: _ordered(answer[n], known.get(n) or {}, root) for n in names}
    if isinstance(answer, list):
        return [_ordered(item, schema.get("items") or {}, root) for item in answer]
    return answer


def _substitute(node: Any, query: str) -> Any:
    if isinstance(node, dict):
        return {name: _substitute(child, query) for name, child in node.items()}
    if isinstance(node, list):
        return [_substitute(child, query) for child in node]
    return query if node == QUERY else node
