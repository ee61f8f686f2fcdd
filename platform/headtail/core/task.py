"""A task: what is asked of every query, as a folder with `task.yaml` and `prompt.j2`.

In: a folder (or the name of a shipped example). Out: a Task that renders messages, checks answers and scores them.
A user brings a new task without touching this package. A Task travels to workers by content: its folder is read, and its
code run (only where `allow_code` says so), once, where it is loaded. Knows nothing of engines or tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import jsonschema_rs
from pydantic import BaseModel, Field

from headtail.core.config import Config, build_config, read_json_like
from headtail.core.errors import ConfigError, InputError
from headtail.core.guardrails import GuardrailConfig, check_guardrails
from headtail.core.keys import fingerprint
from headtail.core.own_code import own_code
from headtail.core.policy import TaskPolicy
from headtail.core.prompt import Prompt, PromptError, read_template
from headtail.core.schema import DECIMALS, Outline, Write, close_objects, fit_check, outline, text_bounds, validator, writer
from headtail.core.score import Counts, ScoreConfig, check_score, score_answer
from headtail.core.scorers import SEMANTIC, Measure

EXAMPLES = Path(__file__).parent.parent / "examples" / "tasks"
QUERY = "$query"  # stands for the query's text in a task's fallback answer


class Sampling(Config):
    """How tokens are drawn."""

    temperature: float = Field(0.0, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: smallest set of tokens with this much probability")
    max_tokens: int = Field(128, ge=1, le=32768, description="maximum of tokens in an answer; a longer one is `truncated`")
    seed: int | None = Field(None, description="seed of the sampler; null lets the engine choose")
    n: int = Field(1, ge=1, le=64, description="samples per query; the answer is the one that most samples give; all are kept")


class Strata(Config):
    """Where the torso ends."""

    torso_min_count: int = Field(2, ge=1, description="events from which a query outside the head is torso rather than tail")


class TaskFile(Config):
    """The fields of task.yaml."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{1,63}$", description="name of the task: small letters, digits, underscores")
    version: int = Field(1, ge=1, description="for people; keys are hashes of the content and do not use this number")
    description: str = Field("", description="one sentence for reports and the model card")
    input: str = Field("query", description="column that holds the query")
    side_inputs: tuple[str, ...] = Field((), description="columns joined to a query and put in the prompt")
    answer: dict[str, Any] | str = Field(description="JSON Schema of an answer, or module:PydanticModel")
    prompt: str = Field("prompt.j2", description="Jinja2 template beside task.yaml with blocks `system` and `user`")
    sampling: Sampling = Field(Sampling(), description="how tokens are drawn")
    score: ScoreConfig = Field(description="how two answers are compared")
    guardrails: GuardrailConfig = Field(GuardrailConfig(), description="what an answer must show before it is served")
    strata: Strata = Field(Strata(), description="where the torso ends")
    gate: TaskPolicy = Field(
        TaskPolicy(), description="what a candidate must show before it may be promoted; written before results are known"
    )
    redacted: Literal["uncached", "cached"] = Field(
        "uncached",
        description="queries with <phone>, <card> or <email>: the fallback, as the number may decide the answer (uncached), or one "
        "answer for all (cached)",
    )
    fallback: dict[str, Any] = Field(description=f"answer when no other source can answer; {QUERY} stands for the query")


@dataclass(frozen=True)
class Task:
    """A task that has been read and checked. `schema` is plain JSON Schema."""

    file: TaskFile
    folder: Path
    schema: dict[str, Any]
    template: str
    measure: Measure | None = None  # what scores answers, where that is code; it does not travel

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def side_inputs(self) -> tuple[str, ...]:
        return self.file.side_inputs

    @cached_property
    def _prompt(self) -> Prompt:
        return Prompt(self.template, ("query", *self.side_inputs))

    @cached_property
    def outline(self) -> Outline:
        """What engines hold answers to, the length of the longest, and what only validation holds. ConfigError without bounds."""
        return outline(self.schema, str(self.folder / "task.yaml"))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before answers are paid for."""
        notes, limit, most = list(self.outline.notes), self.file.sampling.max_tokens, _CHARACTERS * self.file.sampling.max_tokens
        if any(0 < bound < limit for bound in text_bounds(self.outline.schema)):
            notes.append(f"text with maxLength below max_tokens ({limit}) has no quote, backslash or line break under a grammar")
        if self.outline.longest > most:
            notes.append(f"the longest answer has {self.outline.longest:,} characters: max_tokens ({limit}) ends it before, as `truncated`")
        with contextlib.suppress(PromptError):  # of an older task: each row says that it has no prompt
            if "system" in self._prompt.blocks and "system" not in self._prompt.constant:
                notes.append(
                    "prompt: block `system` differs from row to row, so engines cannot cache it; put what differs into block `user`"
                )
        return tuple(f"task {self.name}: {note}" for note in notes)

    @cached_property
    def _writer(self) -> tuple[Any, Write]:
        return fit_check(self.outline.schema), writer(self.outline.schema)

    @cached_property
    def _validator(self) -> Any:
        return validator(self.schema)

    def __getstate__(self) -> dict[str, Any]:  # templates and validators are rebuilt where they are needed
        return {name: getattr(self, name) for name in ("file", "folder", "schema", "template")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def messages(self, query: str, side: Mapping[str, Sequence[str]] | None = None) -> list[dict[str, str]]:
        """The chat messages for one query: system first and the same for all rows, so that its prefix is cached."""
        values: dict[str, Any] = {name: list((side or {}).get(name) or ()) for name in self.side_inputs}
        values["query"] = query
        return self._prompt.messages(values)

    def parse(self, text: str) -> tuple[Any, str]:
        """(answer, "") when `text` is JSON valid under the schema, else (None, reason). Nothing is repaired."""
        try:
            answer = _DECODER.decode(text)
            (self.dump(answer) if "\\u" in text else text).encode()
        except UnicodeEncodeError:
            return None, "not JSON: it holds half of a surrogate pair, which is no text and cannot be stored"
        except (ValueError, RecursionError) as error:
            return None, f"not JSON: {error}"
        schema = self._validator  # built outside of the `try`: a schema that cannot be used is an error, not an invalid answer
        try:
            if schema.is_valid(answer):
                return answer, ""
            problem = next(schema.iter_errors(answer))
        except ValueError as error:  # nested deeper than the validator goes, some 250 levels
            return None, f"schema: answer: {error}"
        return None, f"schema: {'/'.join(map(str, problem.instance_path)) or 'answer'}: {problem.message[:200]}"

    def dump(self, answer: Any) -> str:
        """The stored form of a parsed answer: its canonical JSON, as `keys.canonical` makes it."""
        return _CANONICAL.encode(answer)

    def target(self, answer: Any) -> str:
        """The text a model is taught to write: the one that the grammar of the schema accepts. InputError for no valid answer."""
        is_fit, write = self._writer
        if not is_fit(answer):
            raise InputError(
                "this answer is not allowed by the schema, so no training text can be made of it", where=self.name, value=answer
            )
        return write(answer)

    def fallback(self, query: str) -> Any:
        """The answer given when no model can: schema-valid for every query that fits the schema's bounds."""
        return _substitute(self.file.fallback, query)

    def score(self, expected: Any, given: Any, query: str | None = None) -> Counts:
        """Units right, wrong and missed in `given` against `expected`. `query` decides between spans whose text repeats in it."""
        return score_answer(self.file.score, expected, given, self.measure, query)

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
        own = {"measure": self.measure.digest} if self.measure else {}
        return fingerprint({"score": self.file.score.model_dump(), "fallback": self.file.fallback, **own})

    @cached_property
    def policy_digest(self) -> str:
        """Over the gate's policy, the scorer and the fallback as task.yaml has them: a release's copy of the task has the same."""
        return self.file.gate.digest(self.scoring_digest)

    @cached_property
    def scoring_digest(self) -> str:
        """Over the scorer and the fallback as task.yaml has them: part of the policy's digest."""
        return fingerprint({"score": self.file.score.model_dump(), "fallback": self.file.fallback})


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _decimal(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    if round(number, DECIMALS) != number:
        raise ValueError(f"{text} has more than {DECIMALS} decimals, which no grammar writes")
    return number


class FieldTwice(ValueError):
    """An object of a JSON text has a field twice: which value counts cannot be known."""


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields, as a decoder of JSON asks for it (`object_pairs_hook`). FieldTwice names the field."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise FieldTwice(f"the field {twice!r} occurs twice")
    return made


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_decimal, object_pairs_hook=unique_fields)
_CHARACTERS = 16  # that a token seldom has more than
_TAKEN = ("query", "query_key", "count")  # columns of every query table


def load_task(path: str | Path, allow_code: bool = False) -> Task:
    """The task in a folder, or the shipped example of that name. ConfigError names file, field and value.

    `allow_code`: whether an answer given as module:Model may be imported, which runs that module, and an encoder read from elsewhere.
    """
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
    file = build_config(TaskFile, read_json_like(_within(folder, "task.yaml", where)), where, name="task")
    template = read_template(_within(folder, file.prompt, where))
    answer = file.answer if isinstance(file.answer, dict) else _code_schema(file.answer, folder, where, allow_code)
    task = Task(file, folder.resolve(), close_objects(answer), template)
    _check(task, where)
    return dataclasses.replace(task, measure=_load_measure(file.score, folder, where, allow_code))


def _within(folder: Path, name: str, where: str) -> Path:
    """A file of the task's folder; ConfigError when `name` leads out of it, by itself or by a link."""
    path, parts = folder / name, PurePosixPath(name).parts
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a zero byte
        inside = False
    if not inside or not parts or name.startswith("/") or ".." in parts:
        raise ConfigError("a file outside of the task's folder is not read", where=where, value=name, fix="put it into the folder, no link")
    return path


def _code_schema(name: str, folder: Path, where: str, allow_code: bool) -> dict[str, Any]:
    """The JSON Schema of the pydantic model `module:Model`."""
    if not allow_code:
        fix = "set allow_task_code: true (--set allow_task_code=true) if you trust the task's author, or write the JSON Schema in task.yaml"
        raise ConfigError("field answer names Python code, which would run when the task is loaded", where=where, value=name, fix=fix)
    with own_code(name, where, _fix_code(name, "the model"), "answer"):
        model, _ = _find_code(name, folder, where)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise ConfigError("field answer: not a pydantic model", where=where, value=name, fix=_fix_code(name, "the model"))
        return model.model_json_schema()


def _load_measure(score: ScoreConfig, folder: Path, where: str, allow_code: bool) -> Measure | None:
    """The function that a score of kind semantic or custom names, with the digest of its code, or of the encoder."""
    if score.kind == "semantic":
        fix = "name a folder in the task's folder that holds an encoder and its tokenizer"
        encoder, files = _encoder_files(folder, score.encoder, where, allow_code)
        if not files:
            raise ConfigError("field score.encoder: no such folder, or nothing in it", where=where, value=str(encoder), fix=fix)
        with own_code(score.encoder, where, fix, "score.encoder"):
            digest = fingerprint({str(path.relative_to(encoder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
            return Measure(_find_code(SEMANTIC, folder, where)[0](str(encoder)), digest, score.encoder)
    if score.kind != "custom":
        return None
    name = score.function
    if not allow_code:
        fix = "set allow_task_code: true (--set allow_task_code=true) if you trust the task's author, or choose another score"
        raise ConfigError("field score.function names Python code, which would run on every label", where=where, value=name, fix=fix)
    with own_code(name, where, _fix_code(name, "the function"), "score.function"):
        found, module = _find_code(name, folder, where)
        return Measure(found, fingerprint({"name": name, "code": Path(module.__file__).read_bytes()}), name)


def _encoder_files(folder: Path, name: str, where: str, allow_code: bool) -> tuple[Path, list[Path]]:
    """The folder of an encoder and its files, all in the task's folder. One elsewhere, by its absolute path, where code may run."""
    if allow_code and Path(name).is_absolute():
        return Path(name), sorted(path for path in Path(name).rglob("*") if path.is_file())
    try:
        encoder = _within(folder, name, where)
        paths = sorted(encoder.rglob("*"))
        files = [path for path in paths if _within(folder, str(path.relative_to(folder)), where).is_file()]
    except ConfigError as error:
        fix = "put the encoder into the task's folder, without links; or name its absolute path and set allow_task_code: true, if you "
        raise ConfigError(f"field score.encoder: {error.what}", where=where, value=error.value, fix=f"{fix}trust the author") from None
    adapter = next((path for path in files if path.name == "adapter_config.json"), None)
    if adapter:
        what = "field score.encoder: an adapter names its base model by a path, which may lead out of the task's folder"
        raise ConfigError(what, where=where, value=str(adapter), fix="merge the adapter into its base model, and remove that file")
    return encoder, files


def _fix_code(name: str, what: str) -> str:
    module = name.partition(":")[0]
    return f"{module} is a file {module}.py beside task.yaml, which imports installed packages alone, or an installed module with {what}"


def _find_code(name: str, folder: Path, where: str) -> tuple[Any, Any]:
    """What `module:name` names, and its module. A module beside task.yaml is loaded by its path, under a name of its own."""
    module, _, kind = name.partition(":")
    beside = _within(folder, f"{module}.py", where)
    loaded = _load(beside) if beside.is_file() else importlib.import_module(module)
    return getattr(loaded, kind), loaded


def _load(path: Path) -> Any:
    """The module in a file. Its name is made of its path and content: no other module can have it, nor is sys.path touched."""
    name = f"_headtail_task_{fingerprint({'path': str(path.resolve()), 'text': path.read_bytes()})[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # a .py file
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # pydantic looks names up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check(task: Task, where: str) -> None:
    try:
        validator(task.schema)
    except jsonschema_rs.ValidationError as error:
        place = ".".join(map(str, ["answer", *error.instance_path]))
        fix = "correct it there; docs/task.md lists what an answer schema may have"
        raise ConfigError(f"field {place}: not a JSON Schema: {error.message}", where=where, fix=fix) from None
    check_score(task.file.score, task.outline.schema, where)
    check_guardrails(task.file.guardrails, task.file.score, task.outline.schema, where)
    names = [task.file.input, *task.side_inputs]
    if task.file.input in task.side_inputs or len(set(task.side_inputs)) < len(task.side_inputs) or set(_TAKEN) & set(task.side_inputs):
        twice = next(n for n in task.side_inputs if names.count(n) > 1 or n in _TAKEN)
        fix = f"name each column once; {', '.join(_TAKEN)} are taken"
        raise ConfigError("field side_inputs: this name is taken", where=where, value=twice, fix=fix)
    _check_prompt(task)
    _, problem = task.parse(task.dump(task.fallback("a query")))
    if problem:
        fix = "give an answer that the schema allows"
        raise ConfigError(f"field fallback: not a valid answer: {problem}", where=where, value=task.file.fallback, fix=fix)


def _check_prompt(task: Task) -> None:
    """Renders it with and without side inputs, so that both sides of an `if` are tried."""
    place, marker = str(task.folder / task.file.prompt), "10492 83"  # the same in small and large letters
    try:
        for side in ((), ("some",), ("some", "more")):
            messages = task.messages(marker, dict.fromkeys(task.side_inputs, side))
    except PromptError as error:
        fix = "correct the template there; docs/task.md says what a prompt may do"
        raise ConfigError(f"prompt template: {error}", where=place, fix=fix) from None
    if marker not in messages[-1]["content"]:
        raise ConfigError("prompt template: its block `user` does not show {{ query }}", where=place, fix="write {{ query }} in it")


def _substitute(node: Any, query: str) -> Any:
    if isinstance(node, dict):
        return {name: _substitute(child, query) for name, child in node.items()}
    if isinstance(node, list):
        return [_substitute(child, query) for child in node]
    return query if node == QUERY else node
