"""The command line: help that teaches, errors of a few lines with an exit code, the receipt as the last line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headtail.cli import STAGES, main
from timescale import limit

REPO = Path(__file__).parent.parent


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headtail.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=limit(120),
        env={**os.environ, **(env or {})},
    )


def exits(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(done.value.code or 0)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help").returncode == 0
    shown = run("--help").stdout
    for name in [*STAGES, "serve", "lookup", "status", "doctor", "rollback", "fields"]:
        assert name in shown


@pytest.mark.parametrize("stage", [*STAGES, "serve"])
def test_fields_of_every_stage_are_described(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    from headtail.cli import read_config
    from headtail.cli.stages import _fields

    rows = _fields(type(read_config(stage, None, None, None)), "")
    assert all(text for _, _, text in rows), [path for path, _, text in rows if not text]


def test_receipt_is_the_last_line_of_stdout(tmp_path: Path) -> None:
    done = run(
        "example-data", "--root", str(tmp_path), "--set", "events=200", "--set", "labels=5", "--set", "tracking.enabled=false", "--json"
    )
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout.strip().splitlines()[-1])
    assert receipt["stage"] == "example-data"
    assert receipt["rows"]["events"] == 200


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["plan", "--set", "hed.rows=3"], "unknown field hed"),
        (["plan", "--config", "none.yaml"], "config file not found"),
        (["plan", "--root", "{tmp}"], "ingest has not been run"),
        (["ingest", "--root", "{tmp}", "--set", "log={tmp}/none.csv"], "none.csv"),
        (["ingest", "--root", "/proc/nowhere", "--set", "log={tmp}"], ""),
        (["fields", "none"], "no such stage"),
        (["none"], "No such command"),
        (["plan", "--sett", "x=1"], "No such option"),
        (["distill", "--root", "{tmp}", "--set", "base.shape.layers=2", "--set", "base.model="], "noise"),
    ],
)
def test_bad_input_is_said_in_a_few_lines(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = exits(*[a.replace("{tmp}", str(tmp_path)) for a in arguments])
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert said in error
    assert "Traceback" not in error
    assert len(error.splitlines()) < 12


@pytest.mark.parametrize("command", [["lookup", "pizza"], ["status"], ["rollback"]])
def test_commands_on_a_store_take_the_same_flags(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"root: {tmp_path}/store\ntask: query_intent\n")
    for flags in (["--root", f"{tmp_path}/store"], ["--root", ""], ["--set", "root="]):
        assert exits(*command, *flags) == 2
        assert ("no store here" if flags[1].startswith("/") else "root is empty") in capsys.readouterr().err
    (tmp_path / "store").mkdir()
    for flags in (["--config", str(file)], ["--set", f"root={tmp_path}/store"], ["--root", f"{tmp_path}/store"]):
        if command == ["status"]:
            main([*command, *flags, "--json"])
            assert json.loads(capsys.readouterr().out)["root"] == f"{tmp_path}/store"
        else:
            assert exits(*command, *flags, "--json") == 2
            assert "this store has no release yet" in capsys.readouterr().err or command == ["rollback"]


def test_version() -> None:
    assert run("--version").stdout.startswith("headtail 0.")


def test_importing_the_package_pulls_in_no_framework() -> None:
    code = "import sys, headtail.cli; print([m for m in ('ray', 'torch', 'vllm', 'mlflow', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def documented() -> list[tuple[str, list[str]]]:
    """Every `headtail ...` line shown in README.md and docs/, as (page, words)."""
    found = []
    for page in [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            match = re.match(r"^ {4,}(?:\$ |[A-Z_]+=\S+ )*(?:\.venv/bin/)?headtail (.*)$", line)
            if match and " | " not in line and "..." not in line:
                found.append((str(page.relative_to(REPO)), shlex.split(match[1], comments=True)))
    return found


@pytest.mark.parametrize("page, words", documented(), ids=lambda x: x if isinstance(x, str) else "-".join(x)[:40])
def test_documented_commands_exist_and_their_fields_too(page: str, words: list[str]) -> None:
    from headtail.cli import app, read_config

    groups = {group.typer_instance.info.name: group.typer_instance for group in app.registered_groups if group.typer_instance}
    within, word = (groups[words[0]], words[1]) if words[0] in groups else (app, words[0])
    assert word in {command.name or command.callback.__name__ for command in within.registered_commands if command.callback}
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    if words[0] in {*STAGES, "serve", "review"}:
        read_config(words[0], None, sets, None)


def test_there_are_documented_commands() -> None:
    assert len(documented()) > 15
