"""The size and shape of the package in numbers: what docs/decisions/0016 compares before and after. `make measure` prints them.

    python -m tests.bench.measure [--package platform/headtail] [--no-path]

In: the package's files, read as syntax. The last number comes from a run: a log line becomes a served answer (ingest, plan, precompute
with the null engine, publish, one request), and every module of the package of which a function ran then is on a query's path.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One file."""

    name: str
    lines: int
    tree: ast.Module


def read(package: Path) -> list[Module]:
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = ".".join((package.name, *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        found.append(Module(name, len(text.splitlines()), ast.parse(text)))
    return found


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def is_typed(function: Function) -> bool:
    """Every parameter but self and cls has an annotation, and so has the result."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs, function.args.vararg, function.args.kwarg]
    return function.returns is not None and all(a.annotation for a in arguments if a and a.arg not in ("self", "cls"))


def public(module: Module) -> Iterator[Function | ast.ClassDef]:
    """Functions and classes of the module's top level whose name has no underscore in front."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return (node for node in module.tree.body if isinstance(node, kinds) and not node.name.startswith("_"))


def in_cycles(modules: list[Module]) -> int:
    """Modules that import themselves by way of others, counting imports at the top of a file."""
    place = {module.name: at for at, module in enumerate(modules)}
    edges = np.zeros((len(modules), len(modules)), bool)
    for at, module in enumerate(modules):
        for node in module.tree.body:
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in place else node.module for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name in place and place[name] != at:
                    edges[at, place[name]] = True
    _, component = connected_components(csr_array(edges), directed=True, connection="strong")
    return int(sum(size for size in np.bincount(component) if size > 1))


def measure(package: Path) -> dict[str, Any]:
    modules = read(package)
    every = [function for module in modules for function in functions(module)]
    lengths = np.array([(function.end_lineno or function.lineno) - function.lineno + 1 for function in every])
    names: dict[str, set[str]] = defaultdict(set)
    documented = []
    for module in modules:
        for node in public(module):
            names[node.name].add(module.name)
            documented.append(ast.get_docstring(node) is not None)
    top = {path.name for path in package.iterdir() if not path.name.startswith("_")}
    return {
        "files": len(modules),
        "lines": sum(module.lines for module in modules),
        "lines of the longest file": max(module.lines for module in modules),
        "functions": len(every),
        "lines of a function, median": int(np.median(lengths)),
        "lines of a function, 9 of 10 at most": int(np.quantile(lengths, 0.9)),
        "functions with all types": round(sum(map(is_typed, every)) / len(every), 3),
        "public functions and classes with a docstring": round(sum(documented) / len(documented), 3),
        "modules in import cycles": in_cycles(modules),
        "public names": len(names),
        "public names defined in two modules or more": sum(len(where) > 1 for where in names.values()),
        "names in the package's folder": len(top),
    }


def path_modules() -> list[str]:
    """Modules of which a function runs while one log line becomes a served answer."""
    from .query_path import walk

    seen: set[str] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("headtail.") and frame.f_code.co_name != "<module>":
            seen.add(name)

    with tempfile.TemporaryDirectory(prefix="headtail-path-") as folder:
        threading.setprofile(look)
        sys.setprofile(look)
        try:
            walk(Path(folder))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return sorted(seen)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.measure", description=str(__doc__).splitlines()[0])
    parser.add_argument("--package", type=Path, default=Path("platform/headtail"))
    parser.add_argument("--no-path", action="store_true", help="leave out the run")
    flags = parser.parse_args()
    numbers = measure(flags.package)
    if not flags.no_path:
        modules = path_modules()
        numbers["modules on a query's path"] = len(modules)
        print("\n".join(modules), file=sys.stderr)
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
