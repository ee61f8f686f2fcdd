"""One run of a precompute job in a forked process, without Ray: a kill costs some 0.1 s instead of some 5.

In: a Spec. Out: an exit code: 0 done, 3 an error of headtail's own (its words in `said`), 4 an error that is nobody's (a
stack trace in `said`), -9 killed. Everything is the real thing, from the manifest to the receipt, but that one worker runs
in the driver's process instead of in a Ray actor. This module is imported once, by the server that forks.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
DONE, DELIBERATE, UNFORESEEN = 0, 3, 4


@dataclass(frozen=True)
class Spec:
    """One run. `run` names it as Ray's actors would see it: the same name means that Ray brought the actor back."""

    fields: dict[str, Any]
    plan: str
    said: str
    run: str
    environment: dict[str, str] = field(default_factory=dict)


def start(spec: Spec) -> ForkServerProcess:
    """The run, started. `exitcode` and `pid` are those of a real process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run, args=(spec,), daemon=True)
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), str(TESTS.parent), kept)))  # for the preload
    try:
        process.start()
    finally:
        if kept is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = kept
    return process


def run(spec: Spec) -> None:
    """In the forked process: never returns."""
    os.environ.update(spec.environment)
    from headtail.errors import HeadtailError

    code = UNFORESEEN
    try:
        _precompute(spec)
        code = DONE
    except HeadtailError as error:
        code = DELIBERATE
        Path(spec.said).write_text(str(error), encoding="utf-8")
    except BaseException:
        Path(spec.said).write_text(traceback.format_exc(), encoding="utf-8")
    os._exit(code)  # no clean-up: a forked process has the server's objects too


def _precompute(spec: Spec) -> None:
    from headtail import generate, precompute, progress
    from headtail.config import build

    progress.quiet()
    os.environ["HEADTAIL_CHAOS"] = spec.plan
    _faults().install()

    def here(job: Any, manifest: Any, asks: Sequence[Any], *_: Any, **__: Any) -> list[dict[str, Any]]:
        """Stands for `generate._spread`: all shards in one worker in this process."""
        import json

        batch = {"shard": [ask.shard for ask in asks], "edition": [ask.edition for ask in asks]}
        return [json.loads(text) for text in generate.Worker(job, manifest, spec.run)(batch)["said"]]

    assert callable(generate._spread), "generate changed: see tests/chaos/inline.py"
    generate._spread = here
    precompute.run(build(precompute.Config, spec.fields, "chaos"))


def _faults() -> Any:
    from . import faults

    return faults


def _warm() -> None:
    """In the server that forks: what every run imports and reads first, once."""
    import boto3
    import jinja2
    import pyarrow.parquet  # noqa: F401

    from headtail import precompute
    from headtail.engines import null, openai
    from headtail.task import load_task

    assert all((precompute, null, openai, jinja2))
    load_task("query_segmentation")
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test")  # caches its tables


if multiprocessing.parent_process() is None and multiprocessing.current_process().name == "MainProcess" and "forkserver" in str(
    getattr(multiprocessing, "_chaos", "")
):
    _warm()
