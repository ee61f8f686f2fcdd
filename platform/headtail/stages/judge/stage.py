"""Judge: a model scores answers; people's labels say how far it can be believed; the gate reads the table of scores.

    answers (+ other answers) + human labels -> questions -> precompute with the judge's task -> scores, figures of the judge

A judge is a task (docs/judge.md): precompute asks it as it asks any model, so its answers are kept, resumed and reused. Pointwise scores
go to the gate; pairwise preferences compare two answer sources and are asked in both orders. Decides nothing itself.

    rubric.py  judge.yaml      questions.py  what is asked (pure)      calibration.py  figures (pure)      family.py  whose kin it is
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from headtail.adapters.evaluation_runs import EvaluatedSource, log_evaluations
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage, open_table, read_text
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.batch import read_answers
from headtail.core.config import StageConfig, execution, refuse_filled
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import fingerprint
from headtail.core.receipt import Receipt, StageResult
from headtail.core.rows import ALL, KEY, State
from headtail.core.task import Task, load_task
from headtail.engines import ModelConfig
from headtail.releases.claim import AnswererResult, training_keys
from headtail.releases.look import record_look
from headtail.releases.seal import open_labels, seals_digest
from headtail.releases.traffic import label_rows
from headtail.stages import precompute
from headtail.stages.base import Stage, run_once
from headtail.stages.judge.calibration import JudgeFigure, judge_figures
from headtail.stages.judge.family import answer_families, model_family
from headtail.stages.judge.opinions import judge_remarks, judgement_arrays, judgements, row_score
from headtail.stages.judge.questions import COLUMNS, DRAWN, draw_rows, pair_rows, question_table
from headtail.stages.judge.result import Result
from headtail.stages.judge.rubric import Rubric, load_rubric
from headtail.stages.precompute import Config as PrecomputeConfig
from headtail.stages.precompute.result import Result as PrecomputeResult

VERSION = 2
FILLED = {
    "precompute": {"inputs": "answers", "source": "", "model": "model", "side_inputs": "", "task": "judge"},
}

FIGURES = pa.schema(
    [
        ("figure", pa.string()),
        ("stratum", pa.string()),
        ("n", pa.int64()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("method", pa.string()),
    ]
)


class Config(StageConfig):
    """Whose answers are judged, by whom, and beside which labels. Root, task, references and tracking of the group are filled in."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped example whose answers are judged")
    judge: str = Field("answer_judge", description="task folder with judge.yaml, or a shipped judge: answer_judge, answer_preference")
    model: ModelConfig = Field(ModelConfig(), description="the model that judges, and its engine")
    answers: str = Field("precompute", description="precompute receipt ref of the answers that are judged; precompute: the latest")
    against: str = Field("", description="precompute receipt ref of other answers to the same queries, to compare with; empty: none")
    labels: str = Field("plan:human_labels", description="table ref of people's labels that calibrate the judge; empty: not calibrated")
    score: Literal["exact", "f1"] = Field("exact", description="what a label says of an answer: exact (1 when wholly right) or f1 (0..1)")
    rows: int = Field(1000, ge=0, description="rows of each stratum without a label that are judged beside the labelled ones")
    seed: int = Field(0, ge=0, description="seed of the draw of these rows")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="chance with which an interval covers the truth")
    families: dict[str, str] = Field({}, description="model name -> family, where the name does not begin with it")
    precompute: PrecomputeConfig = Field(PrecomputeConfig(), description="how the judge is asked: workers, limits, retries")
    tracked_rows: int = execution(100, "labelled rows that are shown one by one in MLflow's evaluation runs; 0: none", ge=0, le=2000)

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        refuse_filled("judge", data, FILLED)
        return data


class _Parts(NamedTuple):
    """What a config names, found in the store."""

    store: Storage
    task: Task
    judge: Task
    rubric: Rubric
    answers: Receipt[PrecomputeResult]
    against: Receipt[PrecomputeResult] | None
    labels: tuple[Receipt, str] | None

    @property
    def inputs(self) -> dict[str, Any]:
        found: dict[str, Any] = {"answers": self.answers, "judge": self.judge.fingerprint, "rubric": fingerprint(self.rubric.model_dump())}
        found |= {"against": self.against} if self.against else {}
        return found | ({"labels": self.labels[0].output(self.labels[1]), "seals": seals_digest(self.store)} if self.labels else {})

    @property
    def label_keys(self) -> list[bytes]:
        """Keys of all labelled queries, the sealed ones too: the gate needs the judge's scores beside people's."""
        return list(output_table(self.store, *self.labels, ["query_key"])["query_key"].to_pylist()) if self.labels else []

    @property
    def label_answers(self) -> dict[bytes, str]:
        """People's answers by key, none that is sealed; empty when the judge is not calibrated."""
        if self.labels is None:
            return {}
        receipt, name = self.labels
        table = open_labels(self.store, label_rows(output_table(self.store, receipt, name), receipt.output(name).path))
        return dict(zip(table["query_key"].to_pylist(), table["answer"].to_pylist(), strict=True))

    def replaces(self) -> dict[str, Any]:
        against, labels = self.against.path if self.against else "", f"{self.labels[0].path}:{self.labels[1]}" if self.labels else ""
        names = {"task": self.task.name, "judge": self.judge.name, "answers": self.answers.path, "against": against, "labels": labels}
        return {**names, "model": {}, "precompute": {}}


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Judge the answers once. `task`: what `config.task` names, where it is loaded already."""
    parts = _find(config, task)
    questions = run_once(
        "questions",
        StageResult,
        config,
        lambda stage: _write_questions(stage, config, parts),
        inputs=parts.inputs,
        task=parts.task,
        version=VERSION,
        replaces={**parts.replaces(), "confidence": 0, "families": {}, "score": ""},
    )
    verdicts = _ask(config, parts, questions)

    def work(stage: Stage) -> Result:
        return _write(stage, config, parts, output_table(parts.store, questions, "rows").to_pylist(), verdicts)

    inputs = {**parts.inputs, "questions": questions, **{f"verdicts_{name}": receipt for name, receipt in verdicts.items()}}
    receipt = run_once("judge", Result, config, work, inputs=inputs, task=parts.task, version=VERSION, replaces=parts.replaces())
    for note in receipt.notes:
        say(f"{'judge':<12} {note}")
    return receipt


def _find(config: Config, task: Task | None) -> _Parts:
    store, task = open_storage(config.root), task or load_task(config.task, config.allow_task_code)
    judge = load_task(config.judge, config.allow_task_code)
    rubric = load_rubric(judge, task)
    if rubric.kind == "pairwise" and not config.against:
        fix = "name the other answers, or a pointwise judge such as answer_judge"
        raise ConfigError("a pairwise judge compares two answers", where="against", value="", fix=fix)
    answers = load_receipt(store, "precompute", config.answers, PrecomputeResult)
    against = load_receipt(store, "precompute", config.against, PrecomputeResult) if config.against else None
    for found in filter(None, (answers, against)):
        if found.task not in ("", task.name):
            raise ConfigError("these answers are of another task", where=found.path, value=found.task, fix=f"name answers of {task.name}")
    return _Parts(store, task, judge, rubric, answers, against, load_ref(store, config.labels) if config.labels else None)


def _write_questions(stage: Stage, config: Config, parts: _Parts) -> StageResult:
    keys = pa.array(parts.label_keys, KEY)
    learnt = pa.array(sorted(training_keys(parts.store, load_receipt(parts.store, "precompute", parts.answers.path, AnswererResult))), KEY)
    rows = draw_rows(read_answers(parts.store, parts.answers, COLUMNS), keys, learnt, config.rows, config.seed)
    if parts.against:
        rows = pair_rows(rows, read_answers(parts.store, parts.against, COLUMNS))
    side = _side_inputs(parts, pa.array([row["query_key"] for row in rows], KEY))
    stage.table("rows", pa.Table.from_pylist(rows, schema=DRAWN))
    for name in ("first", "second") if parts.against else ("first",):
        table = question_table(parts.judge, parts.task, rows, side, name == "second")
        if not table.num_rows:
            fix = "judge answers of which some are answered and, beside others, differ from them"
            raise InputError("there is nothing to ask the judge", where=parts.answers.path, value=f"{len(rows):,} rows drawn", fix=fix)
        stage.table(name, table)
        stage.rows[f"asked.{name}"] = table.num_rows
    stage.rows |= {"drawn": len(rows), "labelled": sum(row["labelled"] for row in rows)}
    return StageResult()


def _side_inputs(parts: _Parts, keys: pa.Array) -> dict[bytes, dict[str, list[str]]]:
    """Side inputs of the drawn queries, from the tables that the answers were made of."""
    found: dict[bytes, dict[str, list[str]]] = {}
    for name, path in parts.answers.inputs.items() if parts.task.side_inputs else ():
        output = name.rpartition(".")[2]
        if not parts.store.exists(f"{path}/receipt.json") or name != f"{path}.{output}":
            continue
        receipt = load_receipt(parts.store, path.partition("/")[0], path)
        with open_table(parts.store, receipt.output(output).path) as opened:
            have = [side for side in parts.task.side_inputs if side in opened.schema_arrow.names]
        table = output_table(parts.store, receipt, output, ["query_key", *have])
        for row in table.filter(pc.is_in(table["query_key"], value_set=keys)).to_pylist():
            found[row.pop("query_key")] = {side: value for side, value in row.items() if value}
    return found


def _ask(config: Config, parts: _Parts, questions: Receipt) -> dict[str, Receipt[PrecomputeResult]]:
    """The judge's answers, by round. The store's latest precompute stays the one that it was: a judge's is of another task."""
    before = read_text(parts.store, "precompute/LATEST")
    asked: dict[str, Receipt[PrecomputeResult]] = {}
    for name in (name for name in ("first", "second") if name in questions.outputs):
        rows, whose = f"{questions.output(name).rows:,} rows ({name})", f"{parts.answers.result.source}'s answers, {parts.answers.path}"
        say(f"{'judge':<12} {config.model.model} is asked about {rows} of {whose}")
        fields = {"task": config.judge, "inputs": (f"{questions.path}:{name}",), "model": config.model}
        asked[name] = precompute.run(config.precompute.at(config, config.tracking, **fields), task=parts.judge)
        parts.store.replace("precompute/LATEST", before.encode())
    return asked


def _verdicts(parts: _Parts, receipt: Receipt | None) -> dict[bytes, str]:
    """The judge's verdict on each query that it answered."""
    found = {}
    for table in read_answers(parts.store, receipt, ["query_key", "state", "answer"]) if receipt else ():
        for row in table.filter(pc.equal(table["state"], State.ANSWERED.value)).to_pylist():
            found[row["query_key"]] = parts.rubric.verdict(json.loads(row["answer"]))
    return found


def _write(
    stage: Stage, config: Config, parts: _Parts, rows: Sequence[Mapping[str, Any]], verdicts: Mapping[str, Receipt[PrecomputeResult]]
) -> Result:
    pairwise, model = parts.rubric.kind == "pairwise", verdicts["first"].result.model
    table = judgements(parts.rubric, rows, _verdicts(parts, verdicts["first"]), _verdicts(parts, verdicts.get("second")))
    labels = parts.label_answers
    record_look(parts.store, "judge", parts.task.name, parts.task.policy_digest, _compared_rows(table, labels))
    arrays = judgement_arrays(parts.task, parts.rubric.kind, config.score, labels, table)
    figures = judge_figures(arrays, pairwise, config.confidence)
    families: dict[str, tuple[str, ...]] = {"judge": (model_family(model.name, config.families),)}
    families["answers"] = answer_families(parts.store, parts.answers, config.families)
    families |= {"against": answer_families(parts.store, parts.against, config.families)} if parts.against else {}
    by_name = {figure.figure: figure for figure in figures if figure.stratum == ALL}
    result = Result(
        model=model,
        kind=parts.rubric.kind,
        answers=parts.answers.path,
        against=parts.against.path if parts.against else "",
        families=families,
        same_family=families["judge"][0] in families["answers"],
        labelled=int((~np.isnan(arrays.people)).sum()),
        agreement=by_name["agreement"].value if "agreement" in by_name else None,
        kappa=by_name["kappa"].value if "kappa" in by_name else None,
    )
    stage.table("preferences" if pairwise else "scores", table)
    stage.table("figures", pa.Table.from_pylist([figure._asdict() for figure in figures], schema=FIGURES))
    stage.rows = {"judged": table.num_rows, "labelled": result.labelled, "without_verdict": table["score"].null_count}
    for figure in figures:
        stage.metrics |= {f"{figure.figure}/{figure.stratum}{end}": value for end, value in _ends(figure) if value is not None}
    for text in judge_remarks(result, by_name, table["score"].null_count):
        stage.note(text)
    _track(stage, config, parts, table, labels)
    return result


def _compared_rows(table: pa.Table, labels: Mapping[bytes, str]) -> dict[str, pa.Table]:
    """Both answers beside people's, as the ledger of looks knows them; nothing without labels."""
    rows = [row for row in table.select(["query_key", "answer", "other"]).to_pylist() if row["query_key"] in labels]
    found = {}
    for name in ("answer", "other"):
        some = [row for row in rows if row[name] is not None]
        columns = {"wanted": [labels[row["query_key"]] for row in some], "given": [row[name] for row in some]}
        if some:
            found[name] = pa.table({"query_key": pa.array([row["query_key"] for row in some], KEY), **columns})
    return found


def _ends(figure: JudgeFigure) -> Iterator[tuple[str, float | None]]:
    yield from (("", figure.value), ("/low", figure.low), ("/high", figure.high))


def _track(stage: Stage, config: Config, parts: _Parts, table: pa.Table, labels: Mapping[bytes, str]) -> None:
    """Labelled rows one by one in MLflow: a dataset by the labels, an evaluation run for each answer source."""
    if not config.tracked_rows or parts.labels is None:
        return
    shown = [row for row in table.to_pylist() if row["query_key"] in labels][: config.tracked_rows]
    wanted = {row["query"]: json.loads(labels[row["query_key"]]) for row in shown}
    sources = []
    for receipt, answer, score in ((parts.answers, "answer", "score_first"), (parts.against, "other", "score_second")):
        if receipt is None:
            continue
        turned = parts.rubric.kind == "pairwise" and answer == "other"  # a preference for the answer is one against the other
        given = {row["query"]: json.loads(row[answer]) if row[answer] is not None else None for row in shown}
        judged = {row["query"]: 1 - row[score] if turned and row[score] is not None else row[score] for row in shown}
        right = {row["query"]: row_score(parts.task, config.score, row["query"], labels[row["query_key"]], row[answer]) for row in shown}
        name = f"{receipt.result.source} {receipt.path}"
        sources.append(EvaluatedSource(name, receipt.result.model.name, given, {"judge": judged, f"people_{config.score}": right}))
    digest = parts.labels[0].output(parts.labels[1]).sha256[:12]
    log_evaluations(stage.tracker, stage.run_id, f"headtail.{parts.task.name}.{digest}", wanted, sources)
