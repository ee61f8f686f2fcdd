"""`headtail fields`: every field of a config, its default and its meaning, on stdout.

In: the name of a command (or `task`: the fields of task.yaml) and a pattern. Out: the fields whose name or meaning it fits.
No name is cut, however narrow the terminal is.
"""

from __future__ import annotations

import fnmatch
import importlib
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from pydantic import BaseModel
from rich.text import Text

from headtail.adapters.progress import answers, say
from headtail.cli.options import MODULES
from headtail.core.config import filled_paths
from headtail.core.errors import ConfigError

NAMES = {**{name: (module, "Config") for name, module in MODULES.items()}, "task": ("headtail.core.task", "TaskFile")}
ALSO = {"doctor": "pipeline", "jobs": "pipeline"}  # they read another command's config
Name = Annotated[str, typer.Argument(help="a command, such as pipeline or serve; or task, for task.yaml")]
Pattern = Annotated[str, typer.Argument(help="show fields with this text in their name or meaning; * and ? work on names")]


class FieldLine(NamedTuple):
    """One field: its path as `--set` takes it, its default, its meaning."""

    path: str
    default: str
    text: str


def fields(name: Name, pattern: Pattern = "") -> None:
    """List a config's fields: headtail fields pipeline distill

    Each line has the name that --set takes and the default; the meaning follows. The second word filters by name or meaning.
    """
    found = [line for line in field_lines(name) if fits(line, pattern)]
    if not found:
        raise ConfigError(f"no field of {name} fits this pattern", where="headtail fields", value=pattern, fix=f"headtail fields {name}")
    for line in found:
        _show(line)
    say(f"{len(found)} fields of {name}; set one with --set FIELD=VALUE, or in the file given to --config")


def field_lines(name: str) -> list[FieldLine]:
    """The fields of the config called `name`. ConfigError lists the names there are."""
    known = ALSO.get(name, name)
    if known not in NAMES:
        raise ConfigError("no command or config has this name", where="headtail fields", value=name, fix=f"one of: {', '.join(NAMES)}")
    module, kind = importlib.import_module(NAMES[known][0]), NAMES[known][1]
    filled = filled_paths(getattr(module, "FILLED", {}))  # the job fills them in and refuses them in a config
    return [line for line in _lines(getattr(module, kind)) if not any(f"{line.path}.".startswith(f"{path}.") for path in filled)]


def fits(line: FieldLine, pattern: str) -> bool:
    """Whether the pattern is part of the name or the meaning, in any case; with * or ? it must fit the whole name."""
    wanted = pattern.lower()
    if set("*?") & set(wanted):
        return fnmatch.fnmatchcase(line.path.lower(), wanted)
    return wanted in line.path.lower() or wanted in line.text.lower()


def _show(line: FieldLine) -> None:
    head = Text.assemble((line.path, "bold"), " = ", (line.default, "cyan"))
    answers.print(head, soft_wrap=True)
    for part in textwrap.wrap(line.text, max(30, min(answers.width, 120) - 4), break_long_words=False, break_on_hyphens=False):
        answers.print(f"    {part}", soft_wrap=True)


def _lines(kind: type[BaseModel], prefix: str = "", group: BaseModel | None = None) -> Iterator[FieldLine]:
    """`group`: the default of the group that these fields are in, whose values are the real defaults."""
    for name, field in kind.model_fields.items():
        default = field.default if group is None else getattr(group, name)
        kind_of = typing.get_origin(field.annotation)
        many = "[]" if kind_of in (tuple, list) else ".NAME" if kind_of is dict else ""
        inner = _model(field.annotation)
        if inner is None:
            required = group is None and field.is_required()
            yield FieldLine(prefix + name, "required" if required else _default_text(default), field.description or "")
        elif many:
            yield FieldLine(prefix + name, "required" if field.is_required() else _default_text(default), field.description or "")
            yield from _lines(inner, f"{prefix}{name}{many}.")
        else:
            if default is None:
                yield FieldLine(prefix + name, "null", field.description or "")
            yield from _lines(inner, f"{prefix}{name}.", default if isinstance(default, BaseModel) else None)


def _default_text(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple | list):
        return f"[{', '.join(map(_default_text, default))}]"
    if isinstance(default, BaseModel):
        return str(default.model_dump(mode="json"))
    return f'"{default}"' if isinstance(default, str) and not _bare(default) else str(default)


def _bare(text: str) -> bool:
    """Whether YAML, as `--set` reads it, reads the text as itself without quotes."""
    try:
        return bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation: itself, in a union with None, or as the items of a list or the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (tuple, list, dict, typing.Union, Annotated):
        return next((found for part in typing.get_args(annotation) if (found := _model(part)) is not None), None)
    return None
