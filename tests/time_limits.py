"""Where a test's time limit is a plain number, which a slow machine breaks, instead of one that tests/timescale.py scales.

In: the syntax tree of a test file. Out: line numbers. It sees numbers given to time-outs and waits, comparisons with a clock or with
a measured time, and calls of httpx that leave its own default of 5 s in force. It does not know what a test measures.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "process_time_ns", "thread_time", "time"}
WAITS = {"acquire", "communicate", "join", "result", "wait_for"}
CALLS = {"delete", "get", "head", "options", "patch", "post", "put", "request", "stream", "Client", "AsyncClient"}
MEASURED = re.compile(r"latency|elapsed|duration|(^|_)(m?s|seconds|took)$")


def bare_limits(tree: ast.AST) -> list[int]:
    """Lines with a time limit that is a plain number, also one of two in a condition, and calls of httpx without `timeout=`."""
    timed = set(_timed_names(tree))
    return sorted({line for node in ast.walk(tree) for line in _lines(node, timed)})


def _lines(node: ast.AST, timed: set[str]) -> Iterator[int]:
    match node:
        case ast.keyword(arg="timeout" | "open_timeout", value=value) if _plain_number(value):
            yield value.lineno
        case ast.Call(func=ast.Attribute(attr=name), args=[*_, last]) if name in WAITS and _plain_number(last):
            yield node.lineno
        case ast.Expr(value=call) | ast.Assert(test=call) if _is_a_wait(call):  # not `limiter.wait(1) == 0`: how long one would wait
            yield node.lineno
        case ast.BinOp(left=left, op=ast.Add(), right=right) if _reads_a_clock(left) and _plain_number(right):
            yield node.lineno
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [left, *others]
            for smaller, larger in (
                (sides[at], sides[at + 1]) if isinstance(op, ast.Lt | ast.LtE) else (sides[at + 1], sides[at])
                for at, op in enumerate(ops)
                if isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
            ):
                if _plain_number(larger) and (_reads_a_clock(smaller) or _is_measured(smaller, timed)):
                    yield node.lineno
    if isinstance(node, ast.Call) and _calls_httpx(node) and not {"timeout", "transport"} & {one.arg for one in node.keywords}:
        yield node.lineno


def _plain_number(node: ast.expr) -> bool:
    """A number, or a sum, product, choice or call of numbers, that no function of timescale scales."""
    match node:
        case ast.Constant(value=value):
            return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        case ast.BinOp(left=left, right=right):
            return _plain_number(left) and _plain_number(right)
        case ast.IfExp(body=body, orelse=other):
            return _plain_number(body) or _plain_number(other)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="httpx"))):
            return any(_plain_number(one) for one in [*node.args, *(word.value for word in node.keywords)])
    return False


def _is_a_wait(node: ast.expr) -> bool:
    """`process.wait(5)`, `assert event.wait(5)`."""
    match node:
        case ast.Call(func=ast.Attribute(attr="wait"), args=[seconds]):
            return _plain_number(seconds)
    return False


def _reads_a_clock(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Attribute) and one.attr in CLOCKS for one in ast.walk(node))


def _timed_names(tree: ast.AST) -> Iterator[str]:
    """Names that hold the difference of two readings of a clock."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(op=ast.Sub()) as value) if _reads_a_clock(value):
                yield name
            case ast.NamedExpr(target=ast.Name(id=name), value=ast.BinOp(op=ast.Sub()) as value) if _reads_a_clock(value):
                yield name


def _is_measured(node: ast.expr, timed: set[str]) -> bool:
    """Whether an expression's value is a time by its name: `took`, `x.seconds`, `row["latency_ms"]`, `row.pop("latency_ms")`."""
    match node:
        case ast.Name(id=name):
            return name in timed or bool(MEASURED.search(name))
        case ast.Attribute(attr=name):
            return bool(MEASURED.search(name))
        case ast.Subscript(slice=ast.Constant(value=str() as name)):
            return bool(MEASURED.search(name))
        case ast.Call(func=ast.Attribute(attr="get" | "pop"), args=[ast.Constant(value=str() as name), *_]):
            return bool(MEASURED.search(name))
        case ast.BinOp(left=left, right=right):
            return _is_measured(left, timed) or _is_measured(right, timed)
    return False


def _calls_httpx(node: ast.Call) -> bool:
    """`httpx.get(...)`, and `partial(httpx.get, ...)`."""
    return any(
        isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "httpx" and one.attr in CALLS
        for one in [node.func, *(node.args[:1] if isinstance(node.func, ast.Name) and node.func.id == "partial" else [])]
    )
