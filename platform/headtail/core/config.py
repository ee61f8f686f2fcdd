"""Configs: frozen pydantic models read from YAML and `--set path.to.field=value`.

In: a YAML file, overrides. Out: a validated model. An unknown name is an error that says which and what was meant.
Each stage keeps its own Config beside its `run`; what all stages share is `StageConfig`.
"""

from __future__ import annotations

import datetime
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headtail.core.errors import ConfigError

T = TypeVar("T", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, no unknown fields, every field with a description and its unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def execution(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes how a job runs (workers, batch sizes) but not its result: left out of fingerprints."""
    return Field(default, description=description, json_schema_extra={"execution": True}, **limits)


class TrackingConfig(Config):
    """Where MLflow is. The environment's MLFLOW_TRACKING_URI is used when `uri` is empty."""

    enabled: bool = execution(True, "log to MLflow; receipts are written to the store in any case")
    uri: str = execution("", "MLflow tracking URI; empty: $MLFLOW_TRACKING_URI, else sqlite:///ROOT/mlflow.db")
    experiment: str = execution("headtail", "MLflow experiment name")
    run_name: str = execution("", "name of the MLflow run; empty: the stage's")
    parent_run: str = execution("", "MLflow run id under which this stage's run is nested; set by `pipeline`")


class StageConfig(Config):
    """What every stage has: a store to work in and a place to report to."""

    root: str = execution("build/quickstart", "store: a directory or s3://bucket/prefix")
    allow_task_code: bool = execution(False, "allow a task's `answer` to name Python code, which then runs")
    tracking: TrackingConfig = execution(TrackingConfig(), "MLflow settings")

    def at(self, job: StageConfig, tracking: TrackingConfig, **changes: Any) -> Self:
        """This stage's config as part of `job`: its store and permissions, `tracking` and `changes`; an unknown name is an error."""
        held = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate(
            {**held, "root": job.root, "allow_task_code": job.allow_task_code, "tracking": tracking, **changes}
        )


def result_fields(config: BaseModel) -> dict[str, Any]:
    """The fields of `config` that change its result, as plain values: what a fingerprint is made over."""
    plain = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("execution"):
            continue
        plain[name] = _plain(getattr(config, name))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return result_fields(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Path | datetime.date):
        return str(value)
    return value


class _AmbiguousYaml(yaml.MarkedYAMLError):
    """YAML that says something else than is meant."""


class _Yaml(yaml.SafeLoader):
    """YAML in which a field that is named twice in one group is an error, and a day is the text that it is."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":timestamp"):
            return node.value  # also because other packages change what SafeLoader makes of it, in the whole process
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, str | int | float | bool) and name in seen:
                raise _AmbiguousYaml(None, None, f"the field {name} occurs twice; keep one", key.start_mark)
            seen |= {name} if isinstance(name, str | int | float | bool) else set()
        return super().construct_mapping(node, deep)


class _JsonLike(_Yaml):
    """YAML whose values are JSON's: what is bare and not text is spelled as in JSON, so that no label becomes something else."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.style is None:  # bare
            kind, shown = node.tag.rsplit(":", 1)[-1], node.value or "an empty value"
            if kind in _KINDS and (kind == "str") == bool(_JSON.fullmatch(node.value)):
                read = _KINDS.get(kind, kind)
                what = f'YAML reads {shown} as {read}: write "{node.value}" in quotes for the text, or {read} as JSON has it'
                if kind == "str":
                    what = (
                        f'YAML reads {shown} as text and JSON as a number: write "{node.value}" in quotes, or the number without exponent'
                    )
                raise _AmbiguousYaml(None, None, what, node.start_mark)
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                raise _AmbiguousYaml(None, None, "the name of a field is not text; write it in quotes", key.start_mark)
        return super().construct_mapping(node, deep)


_KINDS = {"str": "text", "bool": "true or false", "null": "null", "timestamp": "a date", "int": "a number", "float": "a number"}
_MOST_VALUES = 100_000
_JSON = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. ConfigError when it is missing, not UTF-8, not YAML, not a mapping or names a field twice."""
    return _read(path, _Yaml)


def read_json_like(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file whose values are JSON's. `no`, `007`, `2026-11-01` and the like need quotes: ConfigError."""
    return _read(path, _JsonLike)


def _read(path: Path, loader: type[_Yaml | yaml.BaseLoader]) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), loader)  # all are safe loaders
    except FileNotFoundError:
        raise ConfigError("config file not found", where=str(path), fix="check the path given to --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file cannot be read: {error}", where=str(path)) from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        what = "" if isinstance(error, _AmbiguousYaml) else "not valid YAML: "
        raise ConfigError(f"{what}{line}{error.problem}", where=str(path), fix="correct that line") from error
    except (yaml.YAMLError, RecursionError, ValueError, LookupError) as error:  # the last two: `!!int x`, `!!bool x`
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from error
    if data is None:
        return {}
    todo, seen = [data], 0
    while todo:  # an alias counts as what it stands for: a few lines of aliases can be more than a machine holds
        node, seen = todo.pop(), seen + 1
        if seen > _MOST_VALUES:
            raise ConfigError(f"it holds more than {_MOST_VALUES:,} values, aliases followed", where=str(path), fix="make it smaller")
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if not isinstance(data, dict):
        raise ConfigError("a config file must hold a mapping of field to value", where=str(path), value=type(data).__name__)
    return data


def apply_sets(data: dict[str, Any], sets: Sequence[str], loader: type[_Yaml | yaml.BaseLoader] = _Yaml) -> dict[str, Any]:
    """`data` with each `path.to.field=value` applied to it; values are read as YAML, so `3`, `true` and `[a, b]` work."""
    for item in sets:
        path, sign, text = item.partition("=")
        if not sign or not path:
            raise ConfigError("--set takes path.to.field=value", where="--set", value=item, fix="for example --set head.rows=1000")
        try:
            value = yaml.load(text, loader) if text else ""
        except (yaml.YAMLError, ValueError, LookupError):
            value = text
        _put(data, path.strip(), value, item)
    return data


def _put(data: dict[str, Any], path: str, value: Any, item: str) -> None:
    """Write `value` at a dotted path. ConfigError, which shows `item`, when the path leads through a single value."""
    node = data
    *parents, last = path.split(".")
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name} is a single value, not a group of fields", where="--set", value=item)
        node = child
    node[last] = value


def load_config(
    kind: type[T], file: Path | None = None, sets: Sequence[str] = (), base: Mapping[str, Any] | None = None, name: str = ""
) -> T:
    """A `kind` from `base`, then the YAML `file`, then `sets`, each over the one before. `name`: what `headtail fields` calls it."""
    data: dict[str, Any] = dict(base or {})
    if file is not None:
        data.update(read_yaml(file))
    data = apply_sets(data, sets)
    try:
        return kind.model_validate(_overlay_defaults(kind, data))
    except ValidationError as error:
        _restore_texts(data, error, apply_sets(_read(file, yaml.BaseLoader) if file else {}, sets, yaml.BaseLoader))
    return build_config(kind, data, where=str(file) if file else "command line", name=name, sets=sets)


def _restore_texts(data: dict[str, Any], error: ValidationError, texts: dict[str, Any]) -> None:
    """Put into `data` the text as it was typed where a field wants text and YAML reads something else: `release: 0042`."""
    for item in error.errors():
        if item["type"] != "string_type" or not isinstance(item["input"], int | float):
            continue
        node: Any = data
        text: Any = texts
        *parents, last = item["loc"]
        try:
            for part in parents:
                node, text = node[part], text[part]
            node[last] = text[last]
        except (KeyError, IndexError, TypeError):  # nothing that was typed: a value of `base`, a part of a union, a name of a mapping
            continue


def build_config(kind: type[T], data: Mapping[str, Any], where: str, name: str = "", sets: Sequence[str] = ()) -> T:
    """A validated `kind`; a ConfigError that names every bad field, the value seen and the nearest known name. `sets`: what of `data` comes
    from --set and not from `where`."""
    try:
        return kind.model_validate(_overlay_defaults(kind, data))
    except ValidationError as error:
        every = error.errors()
        inner = {item["loc"][:depth] for item in every for depth in range(len(item["loc"]))}
        problems = [item for item in every if item["type"] != "too_short" or item["loc"] not in inner]  # an item is there, and wrong
        groups = list(dict.fromkeys(".".join(map(str, _group(kind, item["loc"][:-1]))) for item in problems))
        within = f" {groups[0]}" if len(groups) == 1 and groups[0] else ""
        fix = f"run: headtail fields {name}{within}" if name else f"see the fields of {kind.__module__}.{kind.__name__}"
        raise ConfigError("\n".join(_say(kind, item) for item in problems), where=_origin(problems, where, sets), fix=fix) from None


def _origin(problems: Sequence[Any], where: str, sets: Sequence[str]) -> str:
    """Where the wrong values come from: those of `sets` that gave one, `where`, or both."""
    blamed: dict[str, None] = {}
    for item in problems:
        place = ".".join(map(str, item["loc"]))
        mine = [one for one in sets if place and _overlap(one.partition("=")[0].strip(), place)]
        blamed |= dict.fromkeys([f"--set {one[:_VALUE_CHARS]}" for one in mine] or [where])
    return ", ".join(blamed)


def _overlap(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _overlay_defaults(kind: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with each group applied to that group's default, so that naming one field of a group keeps the others."""
    return {name: _overlay(field.default, value) if (field := kind.model_fields.get(name)) else value for name, value in data.items()}


def _overlay(default: Any, value: Any) -> Any:
    if not (isinstance(default, BaseModel) and isinstance(value, Mapping)):
        return value
    given = {name: getattr(default, name) for name in default.model_fields_set}
    return given | {name: _overlay(getattr(default, name, None), item) for name, item in value.items()}


_VALUE_CHARS = 200  # of a wrong value that an error shows
_JOBS_OWN = {name: name for name in ("root", "allow_task_code", "tracking", "task")}  # the same for all groups of a job


def refuse_filled(job: str, data: Any, filled: Mapping[str, Mapping[str, str]]) -> None:
    """ConfigError when `data`, fields of a job, sets a field of a group that the job fills in: it would be overwritten.

    `filled`: by group, the paths of such fields and the job's own field to set instead; empty: there is none. For a `before` validator.
    """
    for group, fields in filled.items():
        for path, instead in (_JOBS_OWN | dict(fields)).items():
            if isinstance(data, Mapping) and _is_set(data, [group, *path.split(".")]):
                fix = f"set {instead}" if instead else "leave it out: it names what another stage made"
                raise ConfigError(f"the {job} fills in this field itself", where=f"{group}.{path}", fix=fix)


def filled_paths(filled: Mapping[str, Mapping[str, str]]) -> set[str]:
    """The paths that `refuse_filled` refuses."""
    return {f"{group}.{path}" for group, fields in filled.items() for path in (*_JOBS_OWN, *fields)}


def _is_set(node: Any, path: Sequence[str]) -> bool:
    names = node if isinstance(node, Mapping) else node.model_fields_set if isinstance(node, BaseModel) else ()
    if path[0] not in names:
        return False
    return len(path) == 1 or _is_set(node[path[0]] if isinstance(node, Mapping) else getattr(node, path[0]), path[1:])


def _say(kind: type[BaseModel], item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    value = repr(item["input"])
    if len(value) > _VALUE_CHARS:
        value = f"{value[:_VALUE_CHARS]}..."
    if item["type"] == "extra_forbidden":
        known = _fields_at(kind, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
        return f"unknown field {place} (value {value}){hint}"
    if item["type"] == "missing":
        return f"field {place} is required"
    if not place:  # of the whole: its message names the fields
        return str(item["msg"]).removeprefix("Value error, ")
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"field {place}: {message} (value {value})"


def _group(kind: type[BaseModel], path: Sequence[Any]) -> Sequence[Any]:
    """A path up to the first mapping in it, since `headtail fields` knows no keys of a config."""
    node: Any = kind
    for at, name in enumerate(path):
        field = node.model_fields.get(name) if isinstance(node, type) and issubclass(node, BaseModel) else None
        if field is None:
            return path
        if typing.get_origin(field.annotation) is dict:
            return path[: at + 1]
        node = _inner(field.annotation)
    return path


def _fields_at(kind: type[BaseModel], path: Sequence[Any]) -> list[str]:
    node: Any = kind
    keyed = False
    for name in path:
        if isinstance(name, int) or keyed:  # a place in a list, or a key of a mapping: the model of its values is known by now
            keyed = False
            continue
        field = node.model_fields.get(name) if isinstance(node, type) and issubclass(node, BaseModel) else None
        if field is None:
            return []
        keyed = typing.get_origin(field.annotation) is dict
        node = _inner(field.annotation)
    return sorted(node.model_fields) if node is not None else []


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The model in a field's annotation."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
