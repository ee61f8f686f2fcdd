"""One run of a precompute job in a forked process, without Ray: a kill costs some 0.1 s instead of some 5.

In: a Spec. Out: an exit code: 0 done, 3 an error of headtail's own (its words in `said`), 4 an error that is nobody's (a
stack trace in `said`), -9 killed. Everything is the real thing, from the manifest to the receipt, but that one worker runs
in the driver's process instead of in a Ray actor. Imported by the server that forks, which therefore imports all at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet  # noqa: F401 - so that forked processes need not

from headtail.adapters import progress
from headtail.batch import driver
from headtail.batch.worker import Worker
from headtail.core.config import build_config
from headtail.core.errors import HeadtailError
from headtail.core.task import load_task
from headtail.engines import null, openai  # noqa: F401
from headtail.stages.precompute import stage as precompute

from . import faults, stage_data
from .spec import DELIBERATE, DONE, NO_LEASE, UNFORESEEN, Spec

load_task("query_segmentation")
boto3.client("s3", region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test")  # fills its caches


def run(spec: Spec) -> None:
    """In the forked process: never returns."""
    os.environ.update(spec.environment)
    os.environ[faults.VARIABLE] = spec.plan
    code = UNFORESEEN
    try:
        progress.quiet()
        os.dup2(os.open(f"{spec.said}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        faults.install()
        if NO_LEASE in os.environ:
            assert hasattr(precompute, "hold_lease")
            vars(precompute)["hold_lease"] = lambda *_: contextlib.nullcontext()
        _precompute(spec)
        code = DONE
    except HeadtailError as error:
        code = DELIBERATE
        Path(spec.said).write_text(str(error), encoding="utf-8")
    except BaseException:
        Path(spec.said).write_text(traceback.format_exc(), encoding="utf-8")
    os._exit(code)  # no clean-up: a forked process has the server's objects too


def make(root: str, queries: list[str], environment: dict[str, str]) -> None:
    """In the forked process: the store of a job, with its plan. Never returns."""
    os.environ.update(environment)
    try:
        if root.startswith("s3://"):
            stage_data.bucket(root)
        stage_data.plan(root, queries)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _precompute(spec: Spec) -> None:
    def here(job: Any, manifest: Any, asks: Sequence[Any], *_: Any, **__: Any) -> list[dict[str, Any]]:
        """Stands for `generate._spread`: all shards in one worker in this process. Its errors are raised, not wrapped by Ray."""
        worker = Worker(job, manifest, spec.run)
        worker.work(asks)
        batch = {"shard": [ask.shard for ask in asks], "edition": [ask.edition for ask in asks]}
        return [json.loads(text) for text in worker(batch)["report"]]  # finds all of it published, and says so in its own words

    assert callable(driver._spread), "generate changed: mend this"
    driver._spread = here
    precompute.run(build_config(precompute.Config, spec.fields, "chaos"))
