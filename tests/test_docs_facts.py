"""What docs say of versions and of the fields of configs is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headtail import cli, pipeline
from headtail.cli import fields
from headtail.core import redact, text
from headtail.core.task import load_task

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]  # benchmarks are of their day
OTHER = {"curate.training_set", "gate.evidence"}  # names in the tracking server, not fields
FIELD = re.compile(r"(?<![\w./:@-])([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+)(?![\w/(]|\.[\w*])")


@pytest.fixture(scope="module")
def paths() -> set[str]:
    """Every field of every config, as `headtail fields` has it."""
    return {line.path.replace("[]", "") for name in fields.NAMES for line in fields.field_lines(name)}


def unknown_fields(page: str, paths: set[str]) -> set[str]:
    """`group.field` in backquotes where a config has the group but no such field in it, nor below a group of that name."""
    groups = {part for path in paths for part in path.split(".")[:-1]}
    named = {name for words in re.findall(r"`([^`\n]+)`", page) for name in FIELD.findall(words)}
    named = {
        name for name in named - OTHER if name.split(".")[0] in groups and not name.endswith((".svg", ".json", ".md", ".xml", ".yaml"))
    }
    known = {".".join(path.split(".")[i:j]) for path in paths for i in range(path.count(".") + 1) for j in range(1, path.count(".") + 2)}
    return named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_in_docs_are_fields_of_a_config(page: Path, paths: set[str]) -> None:
    assert not unknown_fields(page.read_text(encoding="utf-8"), paths)


def test_a_field_that_no_config_has_is_seen(paths: set[str]) -> None:
    assert unknown_fields("`encoder.slips`, `encoder.misspelt_share`, `base.model`, `distill_batch.base.modle`, `gate.svg`", paths) == {
        "encoder.slips",
        "distill_batch.base.modle",
    }


def test_versions_of_the_forms_of_text() -> None:
    page = (REPO / "docs" / "text.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+) \(version (\d+)\)$", page, re.MULTILINE) == [
        ("The normal form", str(text.NORMALISATION)),
        ("Redaction", str(redact.VERSION)),
    ]


REAL_DATA = REPO / "docs" / "benchmarks" / "real_data"


@pytest.mark.parametrize("path", sorted(REAL_DATA.glob("*.yaml")), ids=lambda path: path.name)
def test_a_config_of_a_benchmark_is_one_of_today(path: Path) -> None:
    config = cli.read_config("pipeline", path, None, None)
    assert isinstance(config, pipeline.Config)


@pytest.mark.parametrize("path", sorted(REAL_DATA.glob("*/task.yaml")), ids=lambda path: path.parent.name)
def test_a_task_of_a_benchmark_loads(path: Path) -> None:
    assert load_task(path.parent).name == path.parent.name
