"""MLflow's evaluation runs and datasets: answer sources beside each other, row by row, in its UI.

In: wanted answers by query, and answer sources with their answers and scores. Out: one dataset by name, and one evaluation run for each
source under the stage's run. It runs in a process of its own, because `mlflow.genai` takes its server from the process's environment. A
failure is said and stops nothing. Few rows at a time: each is a trace. Knows nothing of judges.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headtail.adapters.progress import say
from headtail.adapters.tracking import Tracker
from headtail.core.secrets import hide

LIMIT_S = 300.0  # for all runs of a call
_ROW_WORKERS = "4"  # with more, SQLite loses rows (MLflow 3.17)


class EvaluatedSource(NamedTuple):
    """An answer source: its answers by query, and scores by name and query (0..1, None where there is none)."""

    name: str
    model: str
    answers: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, float | None]]


def log_evaluations(
    tracker: Tracker, run_id: str, dataset: str, wanted: Mapping[str, Any], sources: Sequence[EvaluatedSource], limit_s: float = LIMIT_S
) -> bool:
    """Log the sources on the rows of `wanted`; False when tracking is off, or it did not work."""
    experiment = tracker.guard(lambda client: client.get_run(run_id).info.experiment_id) if run_id and wanted else None
    if experiment is None:
        return False
    data = {"uri": tracker.uri, "experiment": experiment, "parent": run_id, "dataset": dataset, "wanted": dict(wanted)}
    with tempfile.TemporaryDirectory(prefix="headtail-evaluation-") as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps({**data, "sources": [source._asdict() for source in sources]}), encoding="utf-8")
        env = {
            **os.environ,
            "MLFLOW_GENAI_EVAL_MAX_WORKERS": _ROW_WORKERS,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": tracker.uri,
        }
        command = [sys.executable, "-m", "headtail.adapters.evaluation_runs", str(file)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s, cwd=folder, check=False)
            problem = "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2][:300]
        except (OSError, subprocess.TimeoutExpired) as error:
            problem, done = f"{type(error).__name__}: {error}"[:300], None
        if done is None or done.returncode:
            say(f"warning: MLflow's evaluation runs were not logged: {hide(problem)}; the tables in the store are complete")
        return done is not None and done.returncode == 0


def _log(data: Mapping[str, Any]) -> None:
    """The child's work: this process is its own, so MLflow's globals are too."""
    import mlflow
    from mlflow.genai import datasets

    mlflow.set_experiment(experiment_id=data["experiment"])
    found = [each for each in datasets.search_datasets(experiment_ids=[data["experiment"]]) if each.name == data["dataset"]]
    dataset = found[0] if found else datasets.create_dataset(name=data["dataset"], experiment_id=data["experiment"])
    held = {inputs["query"] for inputs in dataset.to_df()["inputs"]} if found else set()  # merging a record again changes the digest
    new = [{"inputs": {"query": q}, "expectations": {"answer": answer}} for q, answer in data["wanted"].items() if q not in held]
    if new:
        dataset.merge_records(new)
        dataset = datasets.get_dataset(dataset_id=dataset.dataset_id)  # with the digest of what it holds now
    for source in data["sources"]:
        tags = {"mlflow.parentRunId": data["parent"], "headtail.model": source["model"], "headtail.source": source["name"]}
        with mlflow.start_run(run_name=source["name"], tags=tags):
            scorers = [_scorer(name, by_query) for name, by_query in source["scores"].items()]
            mlflow.genai.evaluate(data=dataset, predict_fn=_predict(source["answers"]), scorers=scorers)


def _predict(answers: Mapping[str, Any]) -> Callable[..., Any]:
    def predict(query: str) -> Any:
        return answers.get(query)

    return predict


def _scorer(name: str, by_query: Mapping[str, float | None]) -> Any:
    from mlflow.genai.scorers import scorer

    def look_up(inputs: dict[str, Any]) -> float | None:
        return by_query.get(inputs["query"])

    return scorer(look_up, name=name)


if __name__ == "__main__":
    _log(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
