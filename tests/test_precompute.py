"""The stage: contract, resume after real kills on a real Ray cluster, and real vLLM through it once."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from conftest import answered_by
from headtail.adapters.storage import Storage, open_storage, read_json, write_json, write_table
from headtail.adapters.storage.receipts import load_receipt
from headtail.batch import Limits, read_answers
from headtail.batch.job import Journal
from headtail.batch.ledger import Ledger
from headtail.core import keys
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, EngineError, InputError, LimitReached
from headtail.core.receipt import FileRef, Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS, PLANNED, State, with_side_inputs
from headtail.core.task import EXAMPLES, load_task
from headtail.engines import ModelConfig
from headtail.engines.models import SHIPPED
from headtail.engines.tokens import vocabulary_fingerprint
from headtail.stages.precompute import Config
from headtail.stages.precompute import stage as precompute
from headtail.stages.precompute.dry_run.estimate import Bounds, Estimate
from headtail.stages.precompute.dry_run.terminal import _estimate
from headtail.stages.precompute.stage import job_figures
from test_engines_openai import Server
from timescale import limit

OFF = TrackingConfig(enabled=False)
SIDE = ("businesses",)


def plan(store: Storage, mark: str = "ab12", **tables: list[str]) -> None:
    """A finished plan whose tables hold these queries; `human_labels` gets the human labels' schema."""
    outputs = {}
    for name, queries in tables.items():
        schema = HUMAN_LABELS if name == "human_labels" else PLANNED
        rows: list[dict[str, Any]] = [
            {"query_key": keys.query_key(query), "query": query, "count": i + 1, "stratum": "head", "eval_only": False, "answer": "{}"}
            for i, query in enumerate(queries)
        ]
        table = pa.Table.from_pylist(rows, schema=with_side_inputs(schema, SIDE))
        outputs[name] = write_table(store, f"plan/{mark}/{name}.parquet", table)
    receipt = Receipt(stage="plan", fingerprint=mark, path=f"plan/{mark}", started="", seconds=0, outputs=outputs)
    write_json(store, f"plan/{mark}/receipt.json", receipt.model_dump(mode="json"))
    store.replace("plan/LATEST", f"plan/{mark}".encode())


def config(root: str, **fields: Any) -> Config:
    model = {"engine": "null", "model": fields.pop("model", "null:faults"), "cpus": 0.5}
    return build_config(Config, {"root": root, "tracking": OFF, "inputs": ["plan:head"], "model": model, **fields}, "test")


# --- without a cluster


@pytest.mark.parametrize(
    "key, url, words", [("sk bad key", "https://a.example/v1", "no HTTP header"), ("sk-1", "http://a.example/v1", "unencrypted")]
)
def test_a_key_that_cannot_be_sent_is_refused_before_anything_starts(
    root: str, store: Storage, monkeypatch: pytest.MonkeyPatch, key: str, url: str, words: str
) -> None:
    plan(store, head=["a"])
    made = config(root).model_copy(update={"model": ModelConfig(engine="openai", model="some/model", base_url=url)})
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr(precompute, "generate", None)  # not reached
    monkeypatch.setattr(precompute, "preview", None)
    with pytest.raises(ConfigError, match=words):
        precompute.forecast(made, probe=0)
    with pytest.raises(ConfigError, match=words):
        precompute.run(made)


def test_a_table_named_twice_is_an_error(root: str, store: Storage) -> None:
    plan(store, head=["a"])
    with pytest.raises(InputError, match="named twice"):
        precompute.run(config(root, inputs=["plan:head", "plan/ab12:head"]))


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"inputs": ["plan:nothing"]}, InputError),
        ({"inputs": ["nothing"]}, InputError),
        ({"inputs": []}, ConfigError),
        ({"attempts": 0}, ConfigError),
        ({"max_failed_share": 2}, ConfigError),
        ({"sharts": 3}, ConfigError),
        ({"task": "no_such_task"}, ConfigError),
        ({"top_logprobs": 4}, ConfigError),  # this engine knows none
    ],
)
def test_bad_config(root: str, store: Storage, fields: dict[str, Any], error: type[Exception]) -> None:
    plan(store, head=["a"])
    with pytest.raises(error):
        precompute.run(config(root, **fields))


def test_a_model_that_is_not_there_is_named_before_anything_starts(root: str, store: Storage) -> None:
    plan(store, head=["a"])
    asked = build_config(Config, {"root": root, "tracking": OFF, "inputs": ["plan:head"], "model": {"model": "/no/such/model"}}, "test")
    with pytest.raises(ConfigError, match="model not found"):
        precompute.run(asked)
    assert not store.exists("precompute")


def test_figures_are_over_all_runs() -> None:
    states = {str(state): 0 for state in State} | {"answered": 900, "failed": 100}
    ledger = Ledger(
        shards=(),
        rows=1000,
        duplicates=0,
        states=states,
        reasons={},
        computed=10,
        reused=0,
        tokens_in=5000,
        tokens_out=20000,
        seconds=200.0,
        reused_seconds=0.0,
        reused_tokens_in=0,
        reused_tokens_out=0,
        start_s=10.0,
        restarts=0,
        missing_side_inputs={},
    )
    made = job_figures(ledger, Limits(workers=2, usd_per_hour=3.6))
    assert made.rows_per_s == pytest.approx(10)
    assert made.usd == pytest.approx(0.22)
    assert made.usd_per_million == pytest.approx(220)
    half = dataclasses.replace(ledger, reused=500, seconds=100.0, reused_seconds=100.0, reused_tokens_in=2500, reused_tokens_out=10000)
    other = job_figures(half, Limits(workers=2, usd_per_hour=3.6, usd_per_million_tokens_in=1.0, usd_per_million_tokens_out=4.0))
    assert other.usd == pytest.approx(0.12 + 0.0025 + 0.04)
    assert other.usd_saved == pytest.approx(0.1 + 0.0025 + 0.04)
    assert other.usd_per_million == pytest.approx(220 + 85)
    assert (made.tokens_in_per_row, made.tokens_out_per_row, made.answered_share) == (5, 20, 0.9)


def test_a_budget_without_a_price_is_an_error(root: str, store: Storage) -> None:
    plan(store, head=["a"])
    model = {"engine": "openai", "model": "some/model", "base_url": "https://host.example/v1"}
    fields = {"root": root, "tracking": OFF, "inputs": ["plan:head"], "budget_usd": 5.0}
    for step in (precompute.run, lambda asked: precompute.forecast(asked, 0)):
        with pytest.raises(ConfigError, match="usd_per_million_tokens_in") as error:
            step(build_config(Config, {**fields, "model": model}, "test"))
        assert error.value.where == "budget_usd"
    priced = build_config(Config, {**fields, "model": {**model, "usd_per_million_tokens_out": 4.0}}, "test")
    assert precompute.forecast(priced, 0).notes == ()


def test_a_dry_run_says_that_money_is_unknown_and_where_to_set_it(root: str, store: Storage) -> None:
    plan(store, head=["a"])
    model = {"engine": "openai", "model": "some/model", "base_url": "https://host.example/v1"}
    found = precompute.forecast(build_config(Config, {"root": root, "tracking": OFF, "inputs": ["plan:head"], "model": model}, "test"), 0)
    assert "money is unknown" in found.notes[0]
    assert "model.usd_per_million_tokens_out" in found.notes[0]
    span = Bounds(value=1, low=1, high=1)
    lines = Console(width=300, file=io.StringIO())
    lines.print(_estimate(Estimate(rows=1, tokens_in=span, tokens_out=span, engine_s=span, wall_s=span, usd=None), 1))
    assert "unknown" in (text := lines.file.getvalue())  # type: ignore[attr-defined]
    assert "model.usd_per_million_tokens_in" in text
    figures = job_figures(ledger_of({"answered": 9}), Limits(priced=False))
    assert (figures.usd, figures.usd_saved, figures.usd_per_million) == (None, None, None)


def ledger_of(states: dict[str, int], **fields: Any) -> Ledger:
    """Of a job without a file."""
    plain: dict[str, Any] = dict.fromkeys(Ledger.__dataclass_fields__, 0)
    plain |= {"shards": (), "reasons": {}, "missing_side_inputs": {}, "engine": {}, "rows": sum(states.values()), "seconds": 1.0}
    return Ledger(**{**plain, "states": {str(state): states.get(str(state), 0) for state in State}, **fields})


def judge(asked: Config, given_up: int = 0, **states: int) -> None:
    precompute._judge(asked, None, "precompute/x", {str(state): states.get(str(state), 0) for state in State}, given_up, {})


def test_a_job_whose_rows_are_truncated_or_invalid_fails_as_one_whose_rows_fail(root: str) -> None:
    with pytest.raises(EngineError, match="6 of 10 rows have no answer, more than max_unanswered_share=") as error:
        judge(config(root), answered=4, truncated=4, invalid=2)
    assert error.value.value == "4 answered, 4 truncated, 2 invalid"
    judge(config(root), answered=5, truncated=5)
    judge(config(root, max_unanswered_share=1), truncated=5)
    with pytest.raises(EngineError, match="5 of 10 rows failed") as error:
        judge(config(root), 3, answered=5, failed=5)
    assert "but for 3 that were asked in max_runs_per_row=2 runs (raise it to ask them)" in error.value.fix


@pytest.mark.parametrize("state, limit", [("invalid", "max_unanswered_share"), ("failed", "max_failed_share")])
def test_a_finished_job_is_reused_only_within_the_limits_of_today(root: str, store: Storage, state: str, limit: str) -> None:
    plan(store, head=["a"])
    loose = config(root, max_unanswered_share=1, max_failed_share=1)
    folder = precompute._folder(loose, precompute._find(loose))
    write_json(store, f"{folder}/ledger.json", {"reasons": {"no JSON": 12}})
    kept, rows = store.read(f"{folder}/ledger.json"), {"in": 12, state: 12}
    ledger = {"ledger": FileRef(path=f"{folder}/ledger.json", bytes=len(kept), sha256=sha256(kept).hexdigest())}
    made = Receipt(
        stage="precompute", fingerprint=folder[-16:], path=folder, started="x", seconds=1, rows=rows, outputs=ledger, result=answered_by()
    )
    write_json(store, f"{folder}/receipt.json", made.model_dump(mode="json"))
    with pytest.raises(EngineError, match=f"done before, and 12 of 12 rows .*{limit}=") as error:
        precompute.run(config(root))
    assert "ask_again=1" in error.value.fix
    assert not store.exists("precompute/LATEST")
    assert precompute.run(loose).reused


@pytest.mark.usefixtures("answer_here")
def test_after_success_with_failed_rows_it_says_how_to_ask_them_again(
    root: str, store: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(store, head=[*(f"q{i}" for i in range(60)), "!fail"])
    log = tmp_path / "asked"
    model = f"null:faults,log={log}"
    for _ in range(2):
        receipt = precompute.run(config(root, model=model))
        assert "1 rows failed; --set ask_again=1 asks them again" in " ".join(capsys.readouterr().err.split())
    assert (receipt.reused, log.stat().st_size) == (True, 61)
    again = precompute.run(config(root, model=model, ask_again=1))
    assert (again.rows["reused"], again.rows["recomputed"], log.stat().st_size) == (60, 1, 62)
    assert "ask_again=2 asks them again, 1 of them only with --set max_runs_per_row=3" in " ".join(capsys.readouterr().err.split())
    third = precompute.run(config(root, model=model, ask_again=2))
    assert (third.rows["reused"], third.rows["recomputed"], log.stat().st_size) == (61, 0, 62)
    healed = precompute.run(config(root, model=f"null:log={log}", ask_again=3, max_runs_per_row=3))
    assert (healed.rows["answered"], log.stat().st_size) == (61, 63)


def test_rows_in_another_state_of_retry_are_told_like_failed_ones(
    root: str, store: Storage, answer_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(store, head=["!length 1", "!length 2", "!fail", "q"])

    def told(**fields: Any) -> str:
        precompute.run(config(root, max_unanswered_share=1, max_failed_share=1, **fields))
        return " ".join(capsys.readouterr().err.split())

    both = ["truncated", "failed"]
    assert "1 rows failed; --set ask_again=1 asks them again" in told()
    assert "2 rows are truncated and 1 rows failed; --set ask_again=2 asks them again, 3 of them only with" in told(ask_again=1, retry=both)
    assert "max_runs_per_row" not in told(ask_again=1, retry=both, max_runs_per_row=3), "found done under another limit"
    assert "2 rows are truncated; --set ask_again=3 asks them again, 2 of them only with --set max_runs_per_row=3 or more" in told(
        ask_again=2, retry=["truncated"]
    )


# --- on a cluster, null engine


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("status", [402, 404])
def test_what_no_row_can_pass_is_one_clear_error_from_a_real_worker(
    root: str, store: Storage, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A wrong model, an empty account: what, where, value, do, the exit code; no line of Ray's."""
    from headtail.cli import main

    plan(store, head=[f"q{i}" for i in range(20)])
    server = Server()
    server.reply = lambda text, nth: (status, {"error": {"message": "no such thing"}}, {})
    model = f"{{engine: openai, model: some/model, base_url: '{server.url}', cpus: 0.5}}"
    sets = [f"model={model}", "inputs=[plan:head]", "tracking.enabled=false"]
    with pytest.raises(SystemExit) as code:
        main(["precompute", "--root", root, *(part for one in sets for part in ("--set", one))])
    server.http.shutdown()
    server.http.server_close()
    assert code.value.code == {402: 1, 404: 2}[status]
    said = capfd.readouterr().err
    lines = said[said.index("error: ") :].splitlines()
    assert lines[0] == f'error: the endpoint answered {status}: {{"error": {{"message": "no such thing"}}}}'
    assert lines[1:3] == [f"  where: {server.url}/chat/completions", "  value: model some/model"]
    assert lines[3].startswith("  do:    ")
    assert len(lines) == 4
    assert "Traceback" not in said
    assert "ray" not in said.lower()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_ray_says_of_a_worker_that_died_is_not_on_stdout(root: str, store: Storage, capfd: pytest.CaptureFixture[str]) -> None:
    """`--json` promises one line there."""
    from headtail.cli import main

    plan(store, head=[*(f"q{i}" for i in range(40)), "!exit"])
    sets = ["model={engine: null, model: 'null:faults', cpus: 0.5}", "inputs=[plan:head]", "tracking.enabled=false"]
    main(["precompute", "--root", root, "--json", *(part for one in sets for part in ("--set", one))])
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["rows"]["failed"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_contract(root: str, store: Storage) -> None:
    plan(store, head=[f"q{i}" for i in range(300)], human_labels=["q1", "q2", "new"])
    receipt = precompute.run(config(root, inputs=["plan:head", "plan:human_labels"], workers=2, shards=5))
    assert receipt.rows == {
        "in": 301,
        "answered": 301,
        "truncated": 0,
        "invalid": 0,
        "refused": 0,
        "failed": 0,
        "duplicates": 2,
        "reused": 0,
        "recomputed": 301,
        "resumed": 0,
    }
    assert sorted(receipt.outputs) == [*(f"answers/shard-{i:05d}" for i in range(5)), "ledger"]
    table = pa.concat_tables(read_answers(store, receipt))
    assert table.schema.equals(with_side_inputs(ANSWER, SIDE))
    assert sorted(table["query"].to_pylist()) == sorted([*(f"q{i}" for i in range(300)), "new"])
    eval_only = {row["query"] for row in table.to_pylist() if row["eval_only"]}
    assert eval_only == {"q1", "q2", "new"}
    assert set(table["source"].to_pylist()) == {"teacher"}
    assert next(read_answers(store, receipt, ["query_key", "state"])).column_names == ["query_key", "state"]
    wanted = {"rows_per_s", "tokens_in", "tokens_out", "tokens_in_per_row", "tokens_out_per_row", "engine_start_s", "generate_s"}
    assert wanted | {"usd", "usd_saved", "usd_per_million", "answered_share"} == set(receipt.metrics)
    assert receipt.result.engine["engine"] == "null"
    assert receipt.inputs["plan/ab12.head"] == "plan/ab12"
    ledger = read_json(store, receipt.output("ledger").path)
    assert sum(shard["rows"] for shard in ledger["shards"]) == 301

    again = precompute.run(config(root, inputs=["plan:head", "plan:human_labels"], workers=1, shards=9))
    assert again.reused
    assert again.outputs == receipt.outputs


@pytest.mark.usefixtures("answer_here")
def test_a_changed_prompt_is_another_job_and_a_changed_score_is_not(root: str, store: Storage, tmp_path: Path) -> None:
    """DESIGN 2."""
    plan(store, head=[f"q{i}" for i in range(40)])
    folder = tmp_path / "task"
    shutil.copytree(EXAMPLES / "query_segmentation", folder)
    first = precompute.run(config(root, task=str(folder)))
    text = (folder / "task.yaml").read_text()
    changed = text.replace("kind: spans, field: segments, text: text, label: label", "kind: exact").replace("cover: all", "")
    assert "exact" in changed
    (folder / "task.yaml").write_text(changed)
    assert precompute.run(config(root, task=str(folder))).reused
    (folder / "prompt.j2").write_text((folder / "prompt.j2").read_text().replace("Split", "Cut"))
    second = precompute.run(config(root, task=str(folder)))
    assert (second.path != first.path, second.rows["recomputed"]) == (True, 40)
    old, new = (set(pa.concat_tables(read_answers(store, receipt))["answer_key"].to_pylist()) for receipt in (first, second))
    assert not old & new


@pytest.mark.usefixtures("answer_here")
def test_too_many_failed_rows_fail_the_job_and_the_next_run_asks_only_those(root: str, store: Storage) -> None:
    """DESIGN 3."""
    plan(store, head=[*(f"q{i}" for i in range(80)), *(f"!fail {i}" for i in range(20))])
    with pytest.raises(EngineError, match="20 of 100 rows failed") as error:
        precompute.run(config(root))
    assert "told to fail" in str(error.value)
    with pytest.raises(InputError, match="has not been run"):
        load_receipt(store, "precompute")
    receipt = precompute.run(config(root, model="null"))
    assert (receipt.rows["answered"], receipt.rows["failed"], receipt.rows["recomputed"], receipt.rows["resumed"]) == (100, 0, 20, 80)
    assert not receipt.reused


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_budget_ends_a_job_early_and_a_larger_one_goes_on(root: str, store: Storage, tmp_path: Path) -> None:
    plan(store, head=[f"q{i}" for i in range(2000)])
    log = tmp_path / "asked"
    log.touch()
    slow = f"null:delay_us=5000,log={log}"
    with pytest.raises(LimitReached, match="budget_seconds=3 is spent"):
        precompute.run(config(root, model=slow, shards=4, budget_seconds=3))
    asked = log.stat().st_size
    assert 50 < asked < 2000
    assert not store.exists("precompute/LATEST")
    receipt = precompute.run(config(root, model=f"null:log={log}", shards=4))
    assert (receipt.rows["resumed"], receipt.rows["recomputed"]) == (asked, 2000 - asked)
    assert log.stat().st_size == 2000
    with pytest.raises(LimitReached, match="budget_usd=1e-06"):
        precompute.run(config(root, model=slow, retry=["failed", "answered"], budget_usd=1e-6, shards=4))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "word, limit, reason",
    [("!fail", "max_failed_share", "failed: told to fail"), ("!length", "max_unanswered_share", "truncated: stopped at the length limit")],
)
def test_many_rows_without_an_answer_end_a_job_before_its_end(
    root: str, store: Storage, tmp_path: Path, word: str, limit: str, reason: str
) -> None:
    plan(store, head=[f"q{i} {word if i % 3 == 0 else ''}".strip() for i in range(3000)])
    log = tmp_path / "asked"
    log.touch()
    with pytest.raises(LimitReached, match=f"more than {limit}=0.2; .* x {reason}"):
        precompute.run(config(root, model=f"null:faults,delay_us=3000,log={log}", shards=4, **{limit: 0.2}))
    assert 100 < log.stat().st_size < 2500


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_row_that_kills_its_process_is_one_failed_row(root: str, store: Storage, tmp_path: Path) -> None:
    """DESIGN 5: the worker's process dies at once, as with an out-of-memory kill; Ray brings it back each time."""
    plan(store, head=[*(f"q{i}" for i in range(150)), "!exit"])
    log = tmp_path / "asked"
    receipt = precompute.run(config(root, model=f"null:faults,log={log}", shards=2, flush_rows=10))
    assert (receipt.rows["answered"], receipt.rows["failed"]) == (150, 1)
    assert "the engine died or hung on this row" in json.dumps(read_json(store, receipt.output("ledger").path)["reasons"])
    assert log.stat().st_size <= 151 + 5 * (64 + 10)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_job_that_can_never_start_says_so_at_once(root: str, store: Storage) -> None:
    plan(store, head=["a"])
    with pytest.raises(ConfigError, match="are needed, the cluster has"):
        precompute.run(config(root, workers=1000))


_DRIVER = """
import sys
from headtail.stages import precompute
from headtail.core.config import TrackingConfig, build_config
if __name__ == "__main__":
    model = {"engine": "null", "model": sys.argv[2], "cpus": 0.5}
    fields = {"root": sys.argv[1], "tracking": TrackingConfig(enabled=False), "inputs": ["plan:head"], "model": model}
    precompute.run(build_config(precompute.Config, {**fields, "shards": 2, "flush_rows": 50}, "test"))
"""


def _safe_rows(store: Storage) -> int:
    """Rows that the journals of the one job in this store name."""
    found = list(Path(store.root).glob("precompute/*/work/shards/*/journal.json"))
    return sum(ref.rows or 0 for path in found for ref in Journal.model_validate_json(path.read_text()).segments)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_killed_at_sixty_percent_almost_all_finished_rows_survive(root: str, store: Storage, tmp_path: Path) -> None:
    """DESIGN 1, with SIGKILL and small rows: the driver dies, its cluster with it, and another process goes on."""
    total, flush = 1500, 50
    plan(store, head=[f"q{i}" for i in range(total)])
    log = tmp_path / "asked"
    log.touch()
    model = f"null:delay_us=8000,log={log}"  # slow enough that the orphaned worker, which lives some 2 s longer, does not finish
    driver = tmp_path / "driver.py"
    driver.write_text(_DRIVER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, str(driver), root, model],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + limit(120)
        while log.stat().st_size < 0.6 * total:
            assert process.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while True:  # the orphaned worker goes within seconds of its raylet
        before = log.stat().st_size
        time.sleep(2)
        if log.stat().st_size == before:
            break
    asked_first, safe = log.stat().st_size, _safe_rows(store)
    assert 0 < safe <= asked_first < total
    assert asked_first - safe <= 2 * flush  # one flush of each of two shards that may be open
    receipt = precompute.run(config(root, model=f"null:log={log}", shards=2, flush_rows=flush))
    assert (receipt.rows["answered"], receipt.rows["resumed"], receipt.rows["recomputed"]) == (total, safe, total - safe)
    assert log.stat().st_size - asked_first == total - safe


# --- real vLLM through the stage


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated:DeprecationWarning")  # xgrammar, as vLLM calls it
@pytest.mark.usefixtures("answer_here")
def test_vllm_through_the_stage(root: str, store: Storage) -> None:
    """With the likeliest tokens, which a student may learn from. vLLM on Ray: test_pipeline."""
    from transformers import AutoTokenizer

    plan(
        store,
        head=[f"{what} near {where}" for what in ("pizza", "thai food", 'a 12" record') for where in ("boston", "me")] * 1,
        human_labels=["joes"],
    )
    model = {"model": "example:teacher", "max_model_len": 512, "max_num_seqs": 32, "kv_cache_gib": 0.25, "cpus": 2}
    asked = build_config(
        Config,
        {
            "root": root,
            "tracking": OFF,
            "inputs": ["plan:head", "plan:human_labels"],
            "model": model,
            "max_failed_share": 0,
            "top_logprobs": 4,
        },
        "test",
    )
    receipt = precompute.run(asked)
    assert receipt.rows["in"] == 7
    assert receipt.rows["failed"] == receipt.rows["refused"] == 0
    assert receipt.result.engine["max_num_seqs"] == 32
    assert receipt.result.model.name == "example:teacher"
    assert receipt.metrics["engine_start_s"] > 0
    assert receipt.metrics["tokens_in_per_row"] > 10
    task, tokenizer, learnt = load_task("query_segmentation"), AutoTokenizer.from_pretrained(SHIPPED / "teacher"), 0
    for row in pa.concat_tables(read_answers(store, receipt)).to_pylist():
        assert row["model"] == "example:teacher"
        assert (row["state"] == "answered") == (row["confidence"] is not None) == (row["token_ids"] is not None)
        if row["token_ids"] is not None:
            likeliest, sure = (np.array(row[name], float).reshape(-1, 4) for name in ("top_ids", "top_logprobs"))
            assert len(likeliest) == len(row["token_ids"]) == row["tokens_out"]
            assert likeliest[:, 0].tolist() == row["token_ids"], "the likeliest token was written, at temperature 0"
            assert sure[:, 0] == pytest.approx(row["logprobs"], abs=2e-3)
            written = task.target(json.loads(row["answer"])) + tokenizer.eos_token
            learnt += tokenizer(written, add_special_tokens=False)["input_ids"] == row["token_ids"]
    assert learnt >= receipt.rows["answered"] - 1 > 0, "as a student with this vocabulary would write it"
    assert receipt.result.vocabulary == vocabulary_fingerprint(tokenizer)
    assert 10 < receipt.metrics["top_logprobs_bytes_per_row"] < 2000
    assert precompute.run(asked).reused
    assert ModelConfig().model == "example:teacher"
    assert open_storage(root) == store
