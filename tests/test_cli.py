"""The command line: help that teaches, errors of a few lines with an exit code, the receipt as the last line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headtail.adapters.storage import Storage
from headtail.cli import STAGES, main
from headtail.cli.entry import GROUPS
from headtail.cli.options import PANELS
from headtail.core.receipt import Receipt
from headtail.core.task import EXAMPLES, Task
from test_gate import POOR, put, run_gate
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


def test_ctrl_c_says_that_finished_work_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is stopped ends with 130, one line and no stack trace."""

    def stopped(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headtail.stages.plan.run", stopped)
    assert exits("plan") == 130
    assert capsys.readouterr().err.strip() == "stopped; finished work is kept: run the same command again to go on"


STOPPED = """
import os, signal, time
from headtail.adapters.cluster import start_cluster
from headtail.cli import main
from headtail.stages import plan

def stopped(config):
    if {ray}:
        start_cluster(2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

plan.run = stopped
main(["plan"])
"""


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigterm_ends_as_ctrl_c_does(ray: bool) -> None:
    """With Ray in the process too, whose own handler prints a C++ stack and aborts."""
    script = STOPPED.replace("{ray}", str(ray))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=limit(120), check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "stopped; finished work is kept: run the same command again to go on\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help").returncode == 0
    shown = run("--help").stdout
    for name in [*STAGES, "serve", "lookup", "status", "doctor", "rollback", "fields"]:
        assert name in shown


@pytest.mark.parametrize("stage", [*STAGES, "serve"])
def test_fields_of_every_stage_are_described(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    from headtail.cli.fields import field_lines

    rows = field_lines(stage)
    assert rows
    assert all(text for _, _, text in rows), [path for path, _, text in rows if not text]


def test_help_has_each_command_once_by_role_and_on_one_line() -> None:
    shown = run("--help", env={"COLUMNS": "80"}).stdout
    for panel, names in PANELS.items():
        box = shown[shown.index(f"─ {panel} ─") :]
        lines = [line.strip("│ ") for line in box[: box.index("╰")].splitlines()[1:]]
        assert [line.split()[0] for line in lines] == sorted(names, key=GROUPS.__contains__)  # groups of commands come last
        assert all(len(line.split()) > 4 for line in lines), "each line says what the command does"
    named = [name for names in PANELS.values() for name in names]
    assert len(set(named)) == len(named)
    assert {*STAGES} < {*named}


@pytest.fixture
def fields_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `headtail fields` prints to stdout."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        main(["fields", *arguments])
        return capsys.readouterr().out

    return call


def test_fields_are_printed_to_stdout_and_no_name_is_cut() -> None:
    from headtail.cli.fields import field_lines

    shown = run("fields", "pipeline", env={"COLUMNS": "30"}).stdout.splitlines()
    for line in field_lines("pipeline"):
        assert f"{line.path} = {line.default}" in shown
    assert len(field_lines("pipeline")) > 150


def test_fields_takes_a_pattern_of_names_and_meanings(fields_of: Callable[..., str]) -> None:
    named = [line for line in fields_of("pipeline", "distill_batch.lora").splitlines() if not line.startswith(" ")]
    assert [line.split(" = ")[0] for line in named] == [f"distill_batch.lora.{name}" for name in ("rank", "alpha", "dropout", "targets")]
    assert "labels_train_share = 0.7" in fields_of("pipeline", "TRAINS the teacher")
    assert "distill_batch.lora.rank = " in fields_of("pipeline", "distill_b*rank")
    assert "side_inputs = []" in fields_of("task", "side")
    assert exits("fields", "pipeline", "no such thing") == 2


def test_fields_lists_what_a_pipeline_takes_and_nothing_that_it_fills_in() -> None:
    from headtail.cli import read_config
    from headtail.cli.fields import field_lines

    paths = {line.path for line in field_lines("pipeline")}
    assert {"plan.head.coverage", "precompute_teacher.model.model", "distill_realtime.epochs"} <= paths
    assert not {"plan.log", "plan.task", "plan.root", "curate.tracking.uri", "precompute_batch.model.model", "distill_batch.sets"} & paths
    null = tuple(f"{line.path}." for line in field_lines("pipeline") if line.default == "null")
    whole = {line.path.rpartition(".")[0] for line in field_lines("pipeline") if line.default == "required"}  # a field alone is refused
    for line in field_lines("pipeline"):
        alone = line.default != "required" and line.path.rpartition(".")[0] not in whole
        if alone and "[]" not in line.path and not line.path.startswith(null):
            read_config("pipeline", None, [f"{line.path}={line.default}"], None)  # as shown, so --set takes it


def test_fields_shows_the_defaults_in_force(fields_of: Callable[..., str]) -> None:
    from headtail.pipeline import Config

    there = Config().train_teacher
    assert f"train_teacher.epochs = {there.epochs}" in fields_of("pipeline", "train_teacher.epochs")
    assert f"train_teacher.base.model = {there.base.model}" in fields_of("pipeline", "train_teacher.base")
    assert "train_teacher.lora = null" in fields_of("pipeline", "train_teacher.lora")


@pytest.mark.parametrize(
    "arguments, fix",
    [
        (["pipeline", "--set", "distill_batch.lora.rnk=3"], "headtail fields pipeline distill_batch.lora"),
        (["plan", "--set", "hed.rows=3"], "headtail fields plan"),
        (["doctor", "--set", "tsk=x"], "headtail fields pipeline"),
        (["review", "export", "x.csv", "--set", "portt=3"], "headtail fields review"),
        (["ingest", "--set", "task={tmp}", "--set", "log=x"], "headtail fields task"),
    ],
)
def test_an_unknown_field_leads_to_the_command_that_lists_them(
    arguments: list[str], fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task.yaml").write_text("name: x\nsidings: []\n")
    assert exits(*[a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert f"run: {fix}\n" in error
    main(fix.split()[1:])


def test_a_rejection_is_exit_code_0_and_4_under_strict(
    root: str, store: Storage, intent: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def under(name: str, policy: str) -> list[str]:
        folder = tmp_path / name
        shutil.copytree(EXAMPLES / "query_intent", folder)
        text = (folder / "task.yaml").read_text(encoding="utf-8")
        (folder / "task.yaml").write_text(re.sub(r"gate:.*\n(  .*\n)+", f"gate: {policy}\n", text), encoding="utf-8")
        return ["gate", "--root", root, "--set", f"task={folder}", "--set", "tracking.enabled=false"]

    put(store, intent, POOR)
    easy = under("easy", "{minimum: {tail: 0.5}, max_drop: 0.5}")
    main([*easy, "--strict", "--json"])
    assert json.loads(capsys.readouterr().out)["stage"] == "gate"
    strict = under("strict", "{minimum: {tail: 0.9}, max_drop: 0.04}")
    main(strict)
    assert exits(*strict, "--strict") == 4
    assert "REJECTED" in capsys.readouterr().err
    assert exits(*under("looser", "{minimum: {tail: 0.4}, max_drop: 0.5}")) == 1  # a policy is not loosened after a gate
    assert "under a stricter policy: minimum" in capsys.readouterr().err
    assert exits(*strict, "--set", "max_drop=1") == 2  # a policy is the task's
    assert "exit code 4" in run("gate", "--help", env={"COLUMNS": "200"}).stdout


def test_a_pipeline_is_rejected_under_strict_by_any_of_its_gates(root: str, store: Storage, intent: Task) -> None:
    from headtail.cli.stages import _rejection

    put(store, intent, POOR)
    good, bad = run_gate(store, minimum={"tail": 0.5}, max_drop=0.5), run_gate(store, max_drop=0.04)
    report = Receipt(stage="report", fingerprint="r", path="report/r", started="", seconds=0)
    assert "no human labels" in _rejection(report, root)
    assert _rejection(report.model_copy(update={"inputs": {"gate_batch": good.path}}), root) == ""
    both = report.model_copy(update={"inputs": {"gate_batch": good.path, "gate_realtime": bad.path, "plan": "plan/x"}})
    assert "(batch_student) is rejected" in _rejection(both, root)


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
        (["fields", "none"], "no command or config has this name"),
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
