"""The rivals and headtail on the same rows, each in a process of its own: seconds per number of rows.

    python -m tests.bench.systems raw|raw-plain|engine|ray-data-llm|headtail ROWS [ROWS ...] [--threads N] [--engines N]

In: numbers of rows. Out: one line of JSON: {"rows": seconds}, and the processor seconds of this process, in which the engines of raw and
`engine` run. Same model, prompts, sampling, grammar and engine arguments for all. Each is warmed with a small run first. Start-up is in the
seconds of systems that start anew for each number, so only differences between numbers are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from headtail.core.keys import normalise, query_key
from headtail.core.task import Task, load_task
from headtail.engines import ModelConfig
from headtail.examples.example_data import Config as ExampleDataConfig
from headtail.examples.example_data import sample

TASK = "query_segmentation"
WARM = 300  # rows of a first run, not counted: the first job of a process also starts Ray's workers and imports
LOGICAL_CPUS = 8  # of Ray: every stage of ray.data.llm wants one; two real cores do the work


def queries(rows: int) -> list[str]:
    """Distinct queries of the example data, the same on every machine."""
    config = ExampleDataConfig(universe=max(50_000, 8 * rows))
    return [normalise(text) for text, _, _ in sample(config, rows, "bench")]


def model(threads: int) -> ModelConfig:
    """The reference teacher as every system runs it."""
    return ModelConfig(model="example:teacher", cpus=threads)


def parts(threads: int) -> tuple[Task, str, dict[str, Any], dict[str, Any], str]:
    """(task, model folder, engine arguments, sampling, grammar): what headtail's engine is started with."""
    from headtail.adapters.storage import LocalStorage
    from headtail.engines.grammar import engine_schema
    from headtail.engines.models import resolve_weights
    from headtail.engines.vllm import engine_arguments, engine_environment

    task, config = load_task(TASK), model(threads)
    os.environ |= engine_environment(config)
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = resolve_weights(config.model, "", LocalStorage("/")).path
    sampling = task.file.sampling.model_dump()
    return task, path, engine_arguments(config, path), sampling, json.dumps(engine_schema(task.schema, sampling["max_tokens"]))


def raw(sizes: Sequence[int], threads: int, logprobs: bool = True) -> Iterator[tuple[int, float]]:
    """vLLM's own LLM class, prompts as token ids made beforehand, one call per size."""
    import torch

    task, _, arguments, sampling, grammar = parts(threads)
    torch.set_num_threads(threads)
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(**arguments)
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(
        temperature=sampling["temperature"],
        max_tokens=sampling["max_tokens"],
        logprobs=0 if logprobs else None,
        structured_outputs=StructuredOutputsParams(json=grammar),
    )
    for rows in sizes:
        chats = [task.messages(query) for query in queries(rows)]
        made = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=False)
        prompts: list[Any] = [{"prompt_token_ids": list(ids)} for ids in made]
        started = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - started
        _check(task, [output.outputs[0].text for output in outputs], rows)
        yield rows, seconds


def engine(sizes: Sequence[int], threads: int) -> Iterator[tuple[int, float]]:
    """headtail's engine alone: prompts made into ids and answers into text, no Ray, no store."""
    from headtail.engines.base import Request
    from headtail.engines.vllm import VllmEngine

    task, path, _, sampling, _ = parts(threads)
    made = VllmEngine(model(threads), path, task.schema, sampling)
    for rows in sizes:
        asked = [Request(i, task.messages(query)) for i, query in enumerate(queries(rows))]
        started = time.monotonic()
        texts = [completion.text for completion in made.generate(asked)]
        seconds = time.monotonic() - started
        _check(task, texts, rows)
        yield rows, seconds
    made.close()


def ray_data_llm(sizes: Sequence[int], threads: int, engines: int, batch: int) -> Iterator[tuple[int, float]]:
    """ray.data.llm's processor; a new pipeline per size."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from headtail.adapters.cluster import start_cluster
    from headtail.engines.vllm import engine_environment

    task, path, arguments, sampling, grammar = parts(threads)
    start_cluster(cpus=LOGICAL_CPUS)
    kwargs = {name: value for name, value in arguments.items() if name not in ("model", "use_tqdm_on_load", "disable_log_stats")}
    config = vLLMEngineProcessorConfig(
        model_source=path,
        engine_kwargs=kwargs,
        concurrency=engines,
        batch_size=batch,
        log_engine_metrics=False,
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": {**engine_environment(model(threads)), "HF_HUB_OFFLINE": "1"}},
        prepare_multimodal_stage=False,
    )
    wanted = {
        "temperature": sampling["temperature"],
        "max_tokens": sampling["max_tokens"],
        "logprobs": 0,
        "structured_outputs": {"json": grammar},
    }
    for rows in sizes:
        items = [{"query": query} for query in queries(rows)]
        processor = build_processor(
            config,
            preprocess=lambda row: {"messages": task.messages(row["query"]), "sampling_params": wanted},
            postprocess=lambda row: {"text": row["generated_text"]},
        )
        started = time.monotonic()
        asked = processor(ray.data.from_items(items).repartition(max(1, rows // 500)))
        texts = [row["text"] for row in asked.iter_rows()]
        seconds = time.monotonic() - started
        _check(task, texts, rows)
        yield rows, seconds


def headtail(sizes: Sequence[int], threads: int, engines: int) -> Iterator[tuple[int, float]]:
    """The precompute stage as it is run: Ray, shards, ledger, audit; a new store and a new engine per size."""
    import pyarrow as pa

    from headtail.adapters.cluster import start_cluster
    from headtail.adapters.storage import open_storage, write_json, write_table
    from headtail.core.config import TrackingConfig, build_config
    from headtail.core.receipt import Receipt
    from headtail.core.rows import PLANNED, with_side_inputs
    from headtail.stages import precompute

    task = load_task(TASK)
    start_cluster(cpus=LOGICAL_CPUS)
    for rows in sizes:
        root = tempfile.mkdtemp(prefix="headtail-bench-")
        store = open_storage(root)
        planned = [
            {"query_key": query_key(query), "query": query, "count": 1, "rank": i + 1, "stratum": "head", "eval_only": False}
            for i, query in enumerate(queries(rows))
        ]
        schema = with_side_inputs(PLANNED, task.side_inputs)
        ref = write_table(store, "plan/x/head.parquet", pa.Table.from_pylist(planned, schema=schema))
        receipt = Receipt(stage="plan", fingerprint="x", path="plan/x", started="", seconds=0, outputs={"head": ref})
        write_json(store, "plan/x/receipt.json", receipt.model_dump(mode="json"))
        fields: dict[str, Any] = {"root": root, "tracking": TrackingConfig(enabled=False), "inputs": ["plan/x:head"]}
        fields |= {"model": model(threads), "workers": engines}
        started = time.monotonic()
        made = precompute.run(build_config(precompute.Config, fields, "bench"))
        seconds = time.monotonic() - started
        assert made.rows["answered"] >= 0.99 * rows, made.rows
        print(json.dumps({"facts": made.result.engine, "metrics": made.metrics}), flush=True)
        yield rows, seconds


def _check(task: Task, texts: Sequence[str], rows: int) -> None:
    """A system that drops rows or gives no valid answers is not quick."""
    valid = sum(task.parse(text)[1] == "" for text in texts)
    assert len(texts) == rows, f"{len(texts)} of {rows} rows came back"
    assert valid >= 0.99 * rows, f"{valid} of {rows} answers are valid"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems: dict[str, Callable[..., Iterator[tuple[int, float]]]] = {
        "raw": lambda sizes, flags: raw(sizes, flags.threads),
        "raw-plain": lambda sizes, flags: raw(sizes, flags.threads, logprobs=False),
        "engine": lambda sizes, flags: engine(sizes, flags.threads),
        "ray-data-llm": lambda sizes, flags: ray_data_llm(sizes, flags.threads, flags.engines, flags.batch),
        "headtail": lambda sizes, flags: headtail(sizes, flags.threads, flags.engines),
    }
    parser.add_argument("system", choices=systems)
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2, help="cores of each engine")
    parser.add_argument("--engines", type=int, default=1, help="engines of ray.data.llm and headtail")
    parser.add_argument("--batch", type=int, default=256, help="ray.data.llm's batch_size")
    flags = parser.parse_args()
    found, processor, before = {}, {}, 0.0
    for rows, seconds in systems[flags.system]([WARM, *flags.rows], flags):
        found[str(rows)], processor[str(rows)] = round(seconds, 3), round(time.process_time() - before, 3)
        before = time.process_time()
    del found[str(WARM)], processor[str(WARM)]
    print(json.dumps({"seconds": found, "processor_seconds": processor}), flush=True)


if __name__ == "__main__":
    main()
