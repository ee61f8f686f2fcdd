"""A prompt template: text with blocks `system` and `user`, checked when it is loaded and rendered in a sandbox. Pure but for reading.

In: the template's text, the names it may use, their values for a row. Out: chat messages. A template reaches nothing but these
values: no other file, no attribute of Python's own, no name of Jinja's that is random or keeps state. What it may compute is
limited, so that no loop or repetition can hold up a job. PromptError names the line. Knows nothing of tasks or models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from jinja2.visitor import NodeTransformer

from headtail.core.errors import ConfigError

ROLES = ("system", "user")
LONGEST = 1_000_000  # characters of a message; characters or items of any value in between
_WORK = 100_000_000  # characters handled for one message; about a second
_STEP = 1_000  # what one round of a loop or one call counts for, so that at most 100,000 are made
_LARGEST = 10**15  # of a whole number
_FILTERS = (
    *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "join", "last", "length"),
    *("list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "select", "selectattr", "slice"),
    *("sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount"),
)
_STATEMENTS = (nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.With, nodes.Block, nodes.Template)
_FORMATTERS = ("format", "format_map")  # their widths are in their text, where no limit sees them
_OTHER_FILES = (nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)


class PromptError(Exception):
    """A template that cannot be used, or does not render. `line` counts from 1; 0 when no line is to blame."""

    def __init__(self, what: str, line: int = 0) -> None:
        self.what, self.line = what, line
        super().__init__(f"line {line}: {what}" if line else what)

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptError, (self.what, self.line)


def read_template(path: Path) -> str:
    """The text of a template file. ConfigError when it is missing, a folder or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise ConfigError("prompt template not found", where=str(path), fix="task.yaml's `prompt` names a file beside it") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"prompt template: line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise ConfigError(what, where=str(path), fix="save the file as UTF-8 (it may be Latin-1 or Windows-1252 now)") from None
    except OSError as error:
        raise ConfigError(f"prompt template cannot be read: {error.strerror}", where=str(path), fix="make it a readable file") from None
    if (at := text.find("\0")) >= 0:
        what = f"prompt template: line {text[:at].count(chr(10)) + 1}: a NUL character"
        raise ConfigError(what, where=str(path), fix="remove it, or save the file as UTF-8 (it may be UTF-16 now)")
    return text


class Prompt:
    """A template that was checked. `names`: the variables that it may use."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        try:
            tree = _ENVIRONMENT.parse(text)
            _check(tree, names)
            free = {block.name: _free(block) for block in tree.find_all(nodes.Block)}
            self._template = jinja2.Template.from_code(_ENVIRONMENT, _ENVIRONMENT.compile(_count_rounds(tree)), dict(_ENVIRONMENT.globals))
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(error.message or "not a template", error.lineno) from None
        except RecursionError:
            raise PromptError("it is nested too deeply") from None
        self.blocks = tuple(free)
        self.constant = {name: self._render(name, {}) for name, is_free in free.items() if is_free}

    def messages(self, values: Mapping[str, Any]) -> list[dict[str, str]]:
        """The chat messages: system first, rendered once when it uses no variable."""
        return [
            {"role": role, "content": self.constant[role] if role in self.constant else self._render(role, values)}
            for role in ROLES
            if role in self._template.blocks
        ]

    def _render(self, role: str, values: Mapping[str, Any]) -> str:
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.blocks[role](self._template.new_context(dict(values))):
                parts.append(part)
                length += len(part)
                if length > LONGEST:
                    raise PromptError(f"block {role}: its text has more than {LONGEST:,} characters")
        except Exception as error:
            what = error.what if isinstance(error, PromptError) else f"{type(error).__name__}: {error}"
            raise PromptError(what, self._line(error)) from None
        return "".join(parts).strip()

    def _line(self, error: BaseException) -> int:
        """The template's line in which an exception came up."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals is self._template.root_render_func.__globals__:
                line = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return line


# --- what a template may say


def _check(tree: nodes.Template, names: Collection[str]) -> None:
    for part in tree.find_all(nodes.Node):
        if isinstance(part, _OTHER_FILES):
            raise PromptError(f"{type(part).__name__.lower()}: a template cannot use other files; write their text here", part.lineno)
        if isinstance(part, nodes.Block) and part.name not in ROLES:
            raise PromptError(f"block {part.name} would be dropped: a prompt has the blocks `system` and `user`", part.lineno)
        if (isinstance(part, nodes.Stmt) and not isinstance(part, _STATEMENTS)) or isinstance(part, nodes.NSRef | nodes.Pow):
            kind = {"Pow": "**", "NSRef": "a namespace"}.get(type(part).__name__, type(part).__name__.lower())
            raise PromptError(f"{kind} is not allowed in a prompt; it may use if, for, set and filters", part.lineno)
        if isinstance(part, nodes.For) and part.recursive:
            raise PromptError("a recursive loop is not allowed in a prompt", part.lineno)
        if isinstance(part, nodes.Filter) and part.name not in _ENVIRONMENT.filters:
            raise PromptError(f"no filter named {part.name}; there are {', '.join(_FILTERS)}", part.lineno)
    for node in tree.body:
        for part in node.nodes if isinstance(node, nodes.Output) else [node]:
            if not isinstance(part, nodes.Block) and not (isinstance(part, nodes.TemplateData) and not part.data.strip()):
                line = part.lineno + _blank_lines(part)
                raise PromptError("text outside of the blocks `system` and `user` would be dropped; put it into one of them", line)
    known = {*names, *_ENVIRONMENT.globals}
    if strange := sorted(meta.find_undeclared_variables(tree) - known):
        line = next((name.lineno for name in tree.find_all(nodes.Name) if name.name == strange[0]), 0)
        raise PromptError(f"'{strange[0]}' is undefined; it may use {', '.join(names)}", line)
    if "user" not in {block.name for block in tree.find_all(nodes.Block)}:
        raise PromptError("needs a block `user` that shows {{ query }}")


def _blank_lines(part: nodes.Node) -> int:
    if not isinstance(part, nodes.TemplateData):
        return 0
    return part.data[: len(part.data) - len(part.data.lstrip())].count("\n")


def _free(block: nodes.Block) -> bool:
    """Whether a block uses no variable: most often the system message, the same for all rows."""
    alone = nodes.Template(block.body, lineno=1)
    alone.set_environment(_ENVIRONMENT)
    return not meta.find_undeclared_variables(alone) - set(_ENVIRONMENT.globals)


def _count_rounds(tree: nodes.Template) -> nodes.Template:
    """`tree` with filters: one counts the rounds of each loop, one limits what a name stands for; ~ becomes `join`."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filter_node(loop.iter, "rounds")
    for assign in tree.find_all(nodes.Assign):
        assign.node = _filter_node(assign.node, "limited")
    for group in tree.find_all(nodes.With):
        group.values = [_filter_node(value, "limited") for value in group.values]
    joined: nodes.Template = _JoinTransformer().visit(tree)
    return joined


def _filter_node(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=_ENVIRONMENT)


class _JoinTransformer(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  # as jinja2 spells it
        self.generic_visit(node)
        return _filter_node(nodes.List(node.nodes, lineno=node.lineno, environment=_ENVIRONMENT), "join")


# --- what it may compute


class _Meter(Context):
    """A rendering's values, and how much it may still compute."""

    left = _WORK

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise PromptError("the template computes too much: a loop, a call or a repetition is too large")


def _size(value: Any) -> int:
    """Characters and items in a value, at every depth. PromptError beyond LONGEST."""
    if isinstance(value, str):
        return len(value)
    size, stack = 0, [value]
    while stack:
        item = stack.pop()
        size += 1 + (len(item) if isinstance(item, str | range) else 0)
        if size > LONGEST:
            raise PromptError(f"a value of more than {LONGEST:,} characters or items")
        stack += [*item.keys(), *item.values()] if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else []
    return size


def _sizes(*values: Any) -> int:
    """The work that a call can make at most: what it is given, times each argument, numbers as they are."""
    work = 1
    for value in values:
        work *= max(1, abs(value) if isinstance(value, int) else _size(value))
    return work


def _limit(value: Any) -> Any:
    """`value`, or PromptError when it is too large."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise PromptError(f"a number beyond {_LARGEST:,}")
    if _size(value) > LONGEST:
        raise PromptError(f"a value of more than {LONGEST:,} characters or items")
    return value


def _spend_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that spends its work before it is done."""
    first = getattr(getattr(function, "jinja_pass_arg", None), "name", "")  # context, eval_context, environment or none of them

    @jinja2.pass_context
    def run(context: _Meter, value: Any, *args: Any, **named: Any) -> Any:
        context.spend(max(1, _size(value)) * _sizes(*args, *named.values()))
        before = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}.get(first, ())
        return _limit(function(*before, value, *args, **named))

    return run


@jinja2.pass_context
def _rounds(context: _Meter, items: Any) -> Iterator[Any]:
    for item in items:
        context.spend(_STEP)
        yield item


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with the arithmetic and the calls of a template limited."""

    intercepted_binops = frozenset(SandboxedEnvironment.default_binop_table)
    context_class = _Meter

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.unsafe_undefined(obj, attribute) if attribute in _FORMATTERS else super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and argument in _FORMATTERS:
            return self.unsafe_undefined(obj, argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise PromptError("% on text is not allowed in a prompt; write {{ }} where the value belongs")
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)) and _sizes(left, right) > LONGEST:
            raise PromptError(f"a value of more than {LONGEST:,} characters or items")
        return _limit(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:  # noqa: N805  # as jinja2 spells it
        __context.spend(_STEP + _size(getattr(__obj, "__self__", "")) * _sizes(*args, *named.values()))
        return _limit(super().call(__context, __obj, *args, **named))


def _environment() -> _Sandbox:
    environment = _Sandbox(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, finalize=_limit)
    environment.globals = {"range": environment.globals["range"]}
    environment.filters = {name: _spend_first(environment.filters[name]) for name in _FILTERS} | {"rounds": _rounds, "limited": _limit}
    return environment


_ENVIRONMENT = _environment()
