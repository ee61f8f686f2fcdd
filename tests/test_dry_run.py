"""The dry run of a job says what the job then does, row for row, before anything is paid. In process, null engine, mostly without Ray."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from conftest import keep
from headtail import cli
from headtail.adapters.storage import Storage, open_storage, read_json
from headtail.batch.catalog import catalog_entries
from headtail.batch.job import Job
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import InputError, LimitReached
from headtail.core.receipt import Receipt
from headtail.core.rows import State
from headtail.core.task import EXAMPLES, Task
from headtail.engines import Completion, ModelConfig, Request
from headtail.stages import precompute
from headtail.stages.precompute.dry_run.changes import changes, key_changes
from headtail.stages.precompute.dry_run.preview import Preview, plan_path, preview
from headtail.stages.precompute.dry_run.terminal import duration, preview_tables
from headtail.stages.precompute.result import PlannedActual
from null_jobs import MakeJob, interrupted, planned, run_here

Groups = dict[tuple[str, ...], int]


def groups(found: Preview) -> Groups:
    """Rows by kind and parts."""
    return {(group.kind, *group.parts): group.rows for group in found.groups}


def table_of(count: int, first: int = 0) -> pa.Table:
    """Every third row has businesses."""
    return planned([f"q{i}" for i in range(first, first + count)])


# --- jobs: what is said is what is done


def check(job: Job, wanted: Groups) -> None:
    """The plan says `wanted`, and the run then asks just the rows that are to be asked."""
    found = preview(job, 0)
    assert groups(found) == wanted
    ledger, worker = run_here(job, "after")
    asked = sum(rows for (kind, *_), rows in wanted.items() if kind in ("retried", "changed", "new"))
    assert (found.ask + found.unrendered, ledger.computed, ledger.rows) == (asked, asked, found.rows)
    assert (worker.engine is None) == (found.ask == 0)


def test_at_first_all_is_new_and_nothing_is_started(make_job: MakeJob) -> None:
    """On local disk and on S3."""
    job = make_job(planned(["a", "b", "c", "a"], businesses=[None] * 4), shards=2)
    found, store = preview(job, 0), open_storage(job.root)
    assert groups(found) == {("new",): 3}
    assert (found.duplicates, found.ask, found.traffic, found.estimate) == (1, 3, 4 + 3 + 2, None)
    assert found.groups[0].examples == ("a", "b", "c")
    assert build_config(Preview, read_json(store, plan_path(job.path)), "test") == found
    assert catalog_entries(store) == []
    check(job, {("new",): 3})
    check(dataclasses.replace(job, path="precompute/y"), {("reused",): 3})


def test_a_prompt_edit_touches_only_rows_that_render_differently(make_local_job: MakeJob, segmentation: Task) -> None:
    run_here(make_local_job(table_of(90), path="precompute/one", shards=2))
    edited = dataclasses.replace(segmentation, template=segmentation.template.replace("Businesses viewed", "People then viewed"))
    job = make_local_job(table_of(100), path="precompute/two", shards=3, task=edited)
    found = preview(job, 0)
    assert found.against == ("precompute/one",)
    (change,) = found.changes
    assert (change.part, change.was) == ("prompt", 'Businesses viewed: {{ businesses | join("; ") }}')
    check(job, {("reused",): 60, ("changed", "prompt"): 30, ("new",): 10})
    comment = dataclasses.replace(segmentation, template=segmentation.template + "{# thanks #}")
    check(make_local_job(table_of(90), path="precompute/three", shards=2, task=comment), {("reused",): 90})


def test_one_changed_side_input_touches_one_row_unless_the_prompt_does_not_show_it(make_local_job: MakeJob, segmentation: Task) -> None:
    queries = [f"q{i}" for i in range(30)]
    viewed: list[object] = [["Joe's", "Ann's"] if i % 3 == 0 else None for i in range(30)]
    run_here(make_local_job(planned(queries, businesses=viewed), path="precompute/one", shards=2))
    viewed[3], viewed[4] = ["Joe's", "Zoe's"], []  # an empty list says the same as none
    check(
        make_local_job(planned(queries, businesses=viewed), path="precompute/two", shards=2),
        {("reused",): 29, ("changed", "side input businesses"): 1},
    )
    one = segmentation.template.replace('businesses | join("; ")', "businesses[0]")
    first = dataclasses.replace(segmentation, template=one)
    run_here(make_local_job(planned(queries, businesses=viewed), path="precompute/three", shards=2, task=first))
    viewed[6], viewed[9] = ["Joe's", "nobody sees this"], ["Tim's"]
    last = make_local_job(planned(queries, businesses=viewed), path="precompute/four", shards=2, task=first)
    check(last, {("reused",): 29, ("changed", "side input businesses"): 1})


def test_parts_are_told_apart_and_added_up(make_local_job: MakeJob, segmentation: Task) -> None:
    queries = [f"q{i}" for i in range(30)]
    viewed: list[object] = [["Joe's"] if i % 3 == 0 else None for i in range(30)]
    run_here(make_local_job(planned(queries, businesses=viewed), path="precompute/one", shards=2))
    viewed[3] = ["Zoe's"]
    template = segmentation.template.replace("Businesses viewed", "People then viewed")
    longer = dataclasses.replace(segmentation, template=template, schema={**segmentation.schema, "minProperties": 1})
    job = make_local_job(planned(queries, businesses=viewed), path="precompute/two", shards=3, task=longer)
    assert [change.part for change in preview(job, 0).changes] == ["prompt", "schema"]
    check(
        job,
        {
            ("changed", "schema"): 20,
            ("changed", "prompt", "schema"): 9,
            ("changed", "prompt", "side input businesses", "schema"): 1,
        },
    )


def test_a_task_that_gains_a_side_input(make_local_job: MakeJob, segmentation: Task) -> None:
    bare = dataclasses.replace(segmentation, file=segmentation.file.model_copy(update={"side_inputs": ()}), template=BARE)
    run_here(make_local_job(table_of(30), path="precompute/one", shards=2, task=bare))
    job = make_local_job(table_of(30), path="precompute/two", shards=2, task=dataclasses.replace(segmentation, template=VIEWED))
    assert [change.part for change in preview(job, 0).changes] == ["prompt", "side inputs"]
    check(job, {("reused",): 20, ("changed", "prompt", "side input businesses"): 10})


BARE = "{% block user %}{{ query }}{% endblock %}"
VIEWED = "{% block user %}{{ query }}{% if businesses %} ({{ businesses[0] }}){% endif %}{% endblock %}"


@pytest.mark.parametrize("broken", ["{{ 1 // 0 }}", "{{ gone }}"])
def test_templates_that_raise_are_compared_too(make_local_job: MakeJob, segmentation: Task, broken: str) -> None:
    raising = dataclasses.replace(segmentation, template="{% block user %}{{ query }}" + broken + "{% endblock %}")
    run_here(make_local_job(table_of(5), path="precompute/one", task=raising))
    again = make_local_job(table_of(5), path="precompute/two", task=raising)
    found = preview(again, 30)  # no row can be asked, so there is nothing to probe
    assert (found.ask, found.unrendered, found.probe) == (0, 5, None)
    assert "the prompt of 5 rows cannot be rendered" in found.notes[0]
    check(again, {("retried", "failed"): 5})
    check(make_local_job(table_of(5), path="precompute/three"), {("changed", "prompt"): 5})


def test_what_is_retried_and_why(make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    table = planned(["!fail 1", "!length", "!invalid", "a", "b"])
    run_here(make_local_job(table, path="precompute/one", shards=1))
    check(make_local_job(table, path="precompute/two", shards=1), {("reused",): 4, ("retried", "failed"): 1})
    more = (State.FAILED, State.TRUNCATED)
    check(
        make_local_job(table, path="precompute/three", shards=1, retry=more),
        {("reused",): 3, ("retried", "failed"): 1, ("retried", "truncated"): 1},
    )
    again = make_local_job(table, path="precompute/one", shards=1)  # the job itself, once more
    check(again, {("resumed",): 4, ("retried", "failed in this job"): 1})
    fresh = make_local_job(planned(["!fail 9", *(f"x{i}" for i in range(50))]), path="precompute/five", shards=1, flush_rows=10)
    asked = interrupted(fresh, 30, "run0", monkeypatch)
    found = preview(fresh, 0)
    assert groups(found) == {("resumed",): 29, ("retried", "failed in this job"): 1, ("new",): 21}
    assert asked == 30
    assert found.spent["seconds"] > 0
    assert found.spent["tokens_out"] > 0


def test_reuse_off_is_said(make_local_job: MakeJob) -> None:
    run_here(make_local_job(table_of(10), path="precompute/one"))
    check(make_local_job(table_of(12), path="precompute/two", reuse=False), {("changed", "reuse is off"): 10, ("new",): 2})


def test_other_sources_and_tasks_are_not_compared_but_their_equal_answers_are_taken(make_local_job: MakeJob, intent: Task) -> None:
    run_here(make_local_job(table_of(10), path="precompute/one", source="batch_student"))
    bfloat = ModelConfig(engine="null", model="null", dtype="bfloat16")
    check(make_local_job(table_of(10), path="precompute/two", model=bfloat), {("new",): 10})
    check(make_local_job(table_of(10), path="precompute/three"), {("reused",): 10})
    check(make_local_job(table_of(10), path="precompute/four", task=intent), {("new",): 10})


def test_the_newest_job_that_asked_a_query_is_the_one_compared_with(make_local_job: MakeJob) -> None:
    run_here(make_local_job(table_of(20), path="precompute/one"))
    half = ModelConfig(engine="null", model="null", dtype="float16")
    run_here(make_local_job(table_of(8), path="precompute/two", model=half))
    job = make_local_job(table_of(20), path="precompute/three", model=half.model_copy(update={"max_model_len": 2048}))
    found = preview(job, 0)
    assert groups(found) == {("changed", "precision", "length limit"): 12, ("changed", "length limit"): 8}
    assert found.against == ("precompute/one", "precompute/two")


@pytest.mark.parametrize(
    "update, said",
    [
        ({"model": {"dtype": "float32"}}, ("precision",)),
        ({"model": {"quantization": "fp8"}}, ("quantization",)),
        ({"model": {"engine": "vllm"}, "digest": "weights"}, ("engine", "model")),
        ({"model": {"base_url": "http://x/v1"}, "digest": "endpoint:x"}, ("endpoint",)),
        ({"digest": "other", "name": "other"}, ("model",)),
        ({"model": {"revision": "ab"}, "digest": "hub:x@ab"}, ("model",)),
        ({"model": {"max_model_len": 99}}, ("length limit",)),
        ({"sampling": {"temperature": 0.5, "n": 3}}, ("sampling temperature", "sampling n")),
        ({"schema": {"properties": {"segments": {"type": "array", "maxItems": 4}}}}, ("schema",)),
        ({"model": {"cpus": 3.0, "usd_per_hour": 9.0, "max_num_seqs": 8}}, ()),
    ],
)
def test_parts_by_the_words_people_use(make_local_job: MakeJob, segmentation: Task, update: dict[str, Any], said: tuple[str, ...]) -> None:
    base = make_local_job(table_of(3))
    run_here(base)
    (entry,) = catalog_entries(open_storage(base.root))
    file = segmentation.file
    file = file.model_copy(update={"sampling": file.sampling.model_copy(update=update.get("sampling", {}))})
    task = dataclasses.replace(segmentation, file=file, schema={**segmentation.schema, **update.get("schema", {})})
    names = {name: update[name] for name in ("digest", "name") if name in update}
    job = dataclasses.replace(base, task=task, model=base.model.model_copy(update=update.get("model", {})), **names)
    assert key_changes(entry, job) == said
    assert [change.part for change in changes(entry, job)] == list(said)
    assert all(change.was != change.now for change in changes(entry, job))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_many_rows_are_compared_by_ray_tasks(make_local_job: MakeJob, segmentation: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(make_local_job(table_of(900), path="precompute/one", shards=7))
    edited = dataclasses.replace(segmentation, template=segmentation.template.replace("Businesses viewed", "People then viewed"))
    job = make_local_job(table_of(1000), path="precompute/two", shards=20, task=edited)
    here = preview(job, 0)
    monkeypatch.setattr("headtail.stages.precompute.dry_run.preview.IN_PROCESS_ROWS", 100)
    there = preview(job, 0)
    assert there.model_copy(update={"seconds": here.seconds}) == here
    assert groups(there) == {("reused",): 600, ("changed", "prompt"): 300, ("new",): 100}


# --- the stage: probes, budgets, --apply


Asked = Callable[[], int]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """How many rows the engine was asked so far, counted where it is asked."""
    log = tmp_path / "asked"
    return lambda: log.stat().st_size if log.exists() else 0


def config(root: str, tmp_path: Path, **fields: Any) -> precompute.Config:
    model = {"engine": "null", "cpus": 0.5, "model": f"null:faults,log={tmp_path}/asked", **fields.pop("model", {})}
    given = {"root": root, "tracking": TrackingConfig(enabled=False), "inputs": ["plan:head"], "model": model, **fields}
    return build_config(precompute.Config, given, "test")


def head(store: Storage, count: int, mark: str = "ab12", first: int = 0) -> None:
    keep(store, "plan", mark, {"head": table_of(count, first)})


@pytest.mark.usefixtures("answer_here")
def test_a_probe_is_never_paid_twice(root: str, store: Storage, tmp_path: Path, asked: Asked) -> None:
    head(store, 300)
    job = config(root, tmp_path, shards=4)
    found = precompute.forecast(job, 50)
    assert (asked(), found.ask, found.probed, groups(found)) == (50, 250, 50, {("new",): 300})
    assert found.probe is not None
    assert found.probe.path.startswith(f"{found.path}/probe/")
    assert found.estimate is not None
    assert found.estimate.rows == 250
    again = precompute.forecast(job, 50)
    assert (asked(), again.estimate, groups(again)) == (50, found.estimate, {("new",): 300})
    assert precompute.forecast(job, 0).estimate == found.estimate  # an earlier probe serves
    more = precompute.forecast(job, 80)
    assert (asked(), more.ask, more.probed) == (80, 220, 80)
    receipt = precompute.run(job, more)
    assert asked() == 300
    assert (receipt.rows["recomputed"], receipt.rows["reused"], receipt.rows["answered"]) == (220, 80, 300)
    assert receipt.result.dry_run["rows"] == PlannedActual(planned=220, actual=220)
    tokens = receipt.result.dry_run["tokens_out"]
    assert tokens.low is not None
    assert tokens.high is not None
    assert tokens.low <= tokens.actual <= tokens.high
    done = precompute.forecast(job, 50)
    assert (asked(), done.ask, groups(done)) == (300, 0, {("resumed",): 300})


@pytest.mark.usefixtures("answer_here")
def test_a_probe_on_other_cores_is_not_timed_together(root: str, store: Storage, tmp_path: Path, asked: Asked) -> None:
    head(store, 300)
    precompute.forecast(config(root, tmp_path), 60)
    wider = config(root, tmp_path, model={"cpus": 2.0, "usd_per_hour": 9.0})
    found = precompute.forecast(wider, 60)
    assert found.notes == ("the probe ran with another cpus: time and money are for that; a larger --probe measures them again",)
    found = precompute.forecast(wider, 100)
    assert found.probe is not None
    assert (found.notes, found.probe.rows, found.probe.pace.rows, asked()) == ((), 100, 40, 100)


@pytest.mark.usefixtures("answer_here")
def test_a_plan_of_other_inputs_is_not_applied(root: str, store: Storage, tmp_path: Path) -> None:
    head(store, 20)
    found = precompute.forecast(config(root, tmp_path), 0)
    head(store, 20, "cd34")
    with pytest.raises(InputError, match="the inputs are not those"):
        precompute.run(config(root, tmp_path), found)


@pytest.mark.usefixtures("answer_here")
def test_a_probe_of_all_there_is_is_exact(root: str, store: Storage, tmp_path: Path, asked: Asked) -> None:
    head(store, 40)
    found = precompute.forecast(config(root, tmp_path), 1000)
    assert found.estimate is not None
    assert found.estimate.usd is not None
    assert (found.ask, found.estimate.exact, found.estimate.usd.high, asked()) == (0, True, 0.0, 40)
    receipt = precompute.run(config(root, tmp_path), found)
    assert (receipt.rows["recomputed"], receipt.rows["reused"], asked()) == (0, 40, 40)


@pytest.mark.usefixtures("answer_here")
def test_a_probe_that_was_killed_goes_on_and_a_plan_halfway_asks_nothing(
    root: str, store: Storage, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    head(store, 300)
    job = config(root, tmp_path, shards=3, flush_rows=10)
    _killed(lambda: precompute.forecast(job, 60), 35, monkeypatch)
    assert asked() == 36  # the last was asked, and never answered
    assert precompute.forecast(job, 60).probed == 60
    assert 36 + 25 <= asked() <= 36 + 30  # 30 of 35 were flushed, or more by the thread that flushes on a slow machine
    _killed(lambda: precompute.run(job), 105, monkeypatch)
    before = asked()
    halfway = precompute.forecast(job, 60)
    assert asked() == before
    assert halfway.probe is not None
    assert halfway.of("resumed") >= 100
    assert halfway.rows == 300
    receipt = precompute.run(job, halfway)
    assert receipt.rows["recomputed"] + halfway.of("resumed") + halfway.probed >= 300
    assert asked() - before == halfway.ask


class _Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def _killed(act: Callable[[], object], after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from headtail.engines.null import NullEngine

    plain, answered = NullEngine.generate, iter(range(after))

    def counted(self: NullEngine, requests: Iterable[Request]) -> Iterator[Completion]:
        for completion in plain(self, requests):
            if next(answered, None) is None:
                raise _Killed
            yield completion

    with monkeypatch.context() as patch:
        patch.setattr(NullEngine, "generate", counted)
        with pytest.raises(_Killed):
            act()


@pytest.mark.usefixtures("answer_here")
def test_over_budget_is_said_by_the_plan_and_refused_by_apply(root: str, store: Storage, tmp_path: Path, asked: Asked) -> None:
    head(store, 2000)
    slow = {"model": f"null:delay_us=1000,log={tmp_path}/asked", "usd_per_hour": 3600.0}
    poor = config(root, tmp_path, model=slow, budget_usd=1.0)
    found = precompute.forecast(poor, 100)
    assert "budget_usd=1" in found.beyond
    with pytest.raises(LimitReached, match="not started: it may cost up to USD"):
        precompute.run(poor, found)
    assert asked() == 100
    late = precompute.forecast(config(root, tmp_path, model=slow, budget_seconds=0.5), 0)
    assert "budget_seconds=0.5" in late.beyond
    rich = precompute.forecast(config(root, tmp_path, model=slow, budget_usd=100.0, budget_seconds=600), 0)
    assert rich.beyond == ""
    assert asked() == 100


@pytest.mark.usefixtures("answer_here")
def test_failed_rows_of_a_probe_are_said_and_stay_to_be_asked(root: str, store: Storage, tmp_path: Path, asked: Asked) -> None:
    queries = [f"!fail {i}" if i % 10 == 0 else f"q{i}" for i in range(200)]
    keep(store, "plan", "ab12", {"head": planned(queries)})
    found = precompute.forecast(config(root, tmp_path), 100)
    assert found.probe is not None
    failed = found.probe.states["failed"]
    assert (found.probed, found.ask) == (100 - failed, 100 + failed)
    assert any("probe rows failed" in note for note in found.notes)


@pytest.mark.usefixtures("answer_here")
def test_without_reuse_the_probe_is_not_counted_as_done(root: str, store: Storage, tmp_path: Path) -> None:
    head(store, 100)
    found = precompute.forecast(config(root, tmp_path, reuse=False), 40)
    assert (found.ask, found.probed) == (100, 0)
    assert any("reuse is off" in note for note in found.notes)
    assert precompute.run(config(root, tmp_path, reuse=False), found).rows["recomputed"] == 100


@pytest.mark.usefixtures("answer_here")
def test_a_changed_scorer_asks_nothing(root: str, store: Storage, tmp_path: Path) -> None:
    head(store, 30)
    folder = tmp_path / "task"
    shutil.copytree(EXAMPLES / "query_segmentation", folder)
    precompute.run(config(root, tmp_path, task=str(folder)))
    file = yaml.safe_load((folder / "task.yaml").read_text())
    file |= {"score": {"kind": "exact"}, "guardrails": {}, "version": 2}
    (folder / "task.yaml").write_text(yaml.safe_dump(file))
    found = precompute.forecast(config(root, tmp_path, task=str(folder)))
    assert (found.ask, groups(found)) == (0, {("resumed",): 30})
    assert "nothing to do" in text_of(found)


@pytest.mark.usefixtures("answer_here")
def test_on_s3(s3_root: str, tmp_path: Path, asked: Asked) -> None:
    """moto stands in for S3."""
    store = open_storage(s3_root)
    head(store, 60)
    precompute.run(config(s3_root, tmp_path))
    head(store, 120, "cd34")
    found = precompute.forecast(config(s3_root, tmp_path), 30)
    assert groups(found) == {("reused",): 60, ("new",): 60}
    receipt = precompute.run(config(s3_root, tmp_path), found)
    assert (receipt.rows["recomputed"], receipt.rows["reused"], asked()) == (30, 90, 120)
    assert read_json(store, plan_path(found.path))["ask"] == 30


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_on_ray_the_true_time_is_within_the_bounds(root: str, store: Storage, tmp_path: Path, asked: Asked) -> None:
    head(store, 500)  # 12 ms a row: what else runs on the machine must not decide the pace
    job = config(root, tmp_path, model={"model": f"null:delay_us=12000,log={tmp_path}/asked"})
    found = precompute.forecast(job, 200)
    assert found.probe is not None
    assert found.probe.pace.steady
    receipt = precompute.run(job, found)
    assert asked() == 500
    told = receipt.result.dry_run
    # simulations test the bounds themselves; here other tests slow the probe or the job down, but not both alike
    span, room = told["engine_s"], 1.3
    assert span.low is not None
    assert span.high is not None
    assert span.low / room <= span.actual <= span.high * room
    assert span.high < 2 * span.low


# --- the command, and what people see


def text_of(found: Preview) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as said:
        console.print(preview_tables(found))
    return said.get()


def command(root: str, tmp_path: Path, *flags: str) -> list[str]:
    sets = ["inputs=[plan:head]", "tracking.enabled=false", "model.engine='null'", f"model.model='null:log={tmp_path}/asked'"]
    return ["precompute", "--root", root, *(word for item in sets for word in ("--set", item)), *flags]


@pytest.mark.usefixtures("answer_here")
def test_the_command(root: str, store: Storage, tmp_path: Path, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    head(store, 100)
    cli.main(command(root, tmp_path, "--dry-run", "--probe", "0", "--json"))
    found = build_config(Preview, json.loads(capsys.readouterr().out.splitlines()[-1]), "test")
    assert (found.ask, asked()) == (100, 0)
    cli.main(command(root, tmp_path, "--dry-run", "--probe", "40"))
    said = capsys.readouterr().out
    for words_of in ("dry run of precompute/", "new", "100.0%", "probe: 40 rows", "what is left, 60 rows, will take", "prompt tokens"):
        assert words_of in said
    cli.main(command(root, tmp_path, "--apply", "--json"))
    shown_last = capsys.readouterr()
    receipt = build_config(Receipt, json.loads(shown_last.out.splitlines()[-1]), "test")
    assert (receipt.rows["recomputed"], asked()) == (60, 100)
    assert "planned and actual" in shown_last.err
    cli.main(command(root, tmp_path, "--dry-run"))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.main(command(root, tmp_path, "--probe", "5"))
    assert left.value.code == 2


@pytest.mark.usefixtures("answer_here")
def test_apply_refuses_over_budget_with_exit_code_1(root: str, store: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head(store, 400)
    flags = ("--set", f"model.model='null:delay_us=500,log={tmp_path}/asked'", "--set", "budget_seconds=0.001", "--apply", "--probe", "30")
    with pytest.raises(SystemExit) as left:
        cli.main(command(root, tmp_path, *flags))
    assert left.value.code == 1
    assert "not started: it may take up to" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(value) for value in (0.04, 119, 121, 7300)] == ["0.0 s", "119.0 s", "2.0 min", "2.0 h"]
