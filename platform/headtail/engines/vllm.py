"""vLLM: messages in, completions under the task's grammar out, with the device kept full.

In: Requests. Out: Completions with finish reason, token counts and the log-prob of each sampled token, for every sample.
vLLM starts and schedules; the loop around its engine core is ours: what vLLM does anew for every row (check the schema,
copy the sampling, wrap each token's log-prob) is done once here, and prompts become ids on another thread. Defaults are
chosen by device, read back from the started engine and asserted. A row that cannot be asked is a Completion with an
error; an engine that breaks raises. Knows nothing of tasks or retries.
"""

from __future__ import annotations

import gc
import os
import queue
import time
import warnings
from collections.abc import Generator, Iterable
from copy import copy
from pathlib import Path
from typing import Any

from headtail.core.errors import ConfigError, EngineError
from headtail.engines.base import Bound, Completion, ModelConfig, Request
from headtail.engines.control import Encoder
from headtail.engines.device import SPINS, precision, threads
from headtail.engines.flight import Flight
from headtail.engines.grammar import BACKEND, described, told
from headtail.engines.load import Load
from headtail.engines.orphans import Guard
from headtail.engines.tokens import Ahead, unfit
from headtail.engines.tokens import token_texts as token_texts

# Rows decoded together and tokens per step. CPU: measured on 2 cores (docs/engines.md); 2048 tokens, vLLM's own default
# for small machines, splits the first prompts over many steps. GPU: vLLM's own classes for offline work, by device memory.
CPU_ROOM = (256, 8192)
GPU_ROOM = (256, 8192)
LARGE_GPU_ROOM = (1024, 16384)
LARGE_GPU_BYTES = 70 * 2**30  # H100, H200, B200, MI300; not A100, on which vLLM saw no gain from more
CPU_BLOCK = 32  # vLLM's 128 exceeds most shared prompts, so none would be found; below 32 its CPU kernels are slower
_YOURS = ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "TOKENIZERS_PARALLELISM", "GOMP_SPINCOUNT")
AHEAD = 64  # rows that wait inside the engine beyond those that run, so that a freed place is taken in the same step
_LOOK_S = 0.2  # between looks whether the core's process still lives: a killed one says nothing
_MASKS = "headtail.engines.masks"
_PROBE = ({"role": "user", "content": "x"},)


def apart(config: ModelConfig) -> bool:
    """Whether the engine's core gets a process of its own."""
    return bool(config.gpus) if config.engine_process is None else config.engine_process


def environment(config: ModelConfig) -> dict[str, str]:
    """What must be in the environment before torch and vLLM are imported."""
    found = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if apart(config) else "0"
    if config.gpus:
        return found
    return found | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding piles engines that share a machine onto the same cores
        "OMP_NUM_THREADS": str(threads(config)),  # Ray would set this to 1
        "GOMP_SPINCOUNT": SPINS,
    }


def room(config: ModelConfig) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) where the config leaves them to us."""
    if not config.gpus:
        return CPU_ROOM
    from vllm.platforms import current_platform

    large = current_platform.get_device_total_memory() >= LARGE_GPU_BYTES and "a100" not in current_platform.get_device_name().lower()
    return LARGE_GPU_ROOM if large else GPU_ROOM


def arguments(config: ModelConfig, path: str) -> dict[str, Any]:
    """vLLM's engine arguments for `config` on the model at `path`. Serving uses the same."""
    seqs, tokens = room(config) if not (config.max_num_seqs and config.max_num_batched_tokens) else (0, 0)
    found: dict[str, Any] = {
        "model": path,
        "dtype": precision(config),
        "trust_remote_code": False,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs or seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens or tokens,
        "enable_prefix_caching": True,
        "structured_outputs_config": {"backend": BACKEND, "disable_any_whitespace": True},
        "generation_config": "vllm",  # sampling is the task's, not the model folder's
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if config.quantization:
        found["quantization"] = config.quantization
    if config.revision and not Path(path).is_dir():
        found["revision"] = config.revision
    if config.gpus:
        found["gpu_memory_utilization"] = config.gpu_memory_utilization
        return found | ({"block_size": config.kv_block_tokens} if config.kv_block_tokens else {})
    if apart(config) and config.tensor_parallel == 1:  # vLLM would put a third process between the core and the model
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        found["distributed_executor_backend"] = UniProcExecutor
    found |= {"enforce_eager": True, "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
    found |= {"block_size": config.kv_block_tokens or CPU_BLOCK}
    return found | {"scheduler_cls": f"{_MASKS}.BatchedScheduler", "worker_cls": f"{_MASKS}.MaskingWorker"}


class VllmEngine:
    """A started vLLM engine. `bound` None leaves answers free, for comparison; `top` of the likeliest tokens come with each token."""

    def __init__(self, config: ModelConfig, path: str, bound: Bound, sampling: dict[str, Any], top: int = 0) -> None:
        started = time.monotonic()
        for name, value in environment(config).items():
            if name in _YOURS:
                os.environ.setdefault(name, value)  # a person who asks for vLLM's logs gets them
            else:
                os.environ[name] = value
        if Path(path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        grammar = told(bound, sampling["max_tokens"], "task.yaml answer")
        self.config, self.arguments, self.apart, self.top = config, arguments(config, path), apart(config), top
        if top:
            self.arguments["max_logprobs"] = top  # vLLM's own limit is 20
        self._engine = _start(config, self.arguments)
        self._core = self._engine.engine_core
        self._guard = Guard(self.core_pids()) if self.apart else None
        self._assert_in_force()
        self._tokenizer = self._engine.get_tokenizer()
        if not getattr(self._tokenizer, "chat_template", None):
            fix = "use an instruction-tuned model, or add chat_template.jinja"
            raise EngineError("the model's tokenizer has no chat template", where=path, fix=fix)
        self._encoder = Encoder(self._tokenizer, config.system_role)
        self._params = self._prepared(sampling_params(sampling, grammar, top), int(sampling.get("n", 1)))
        self._ends = frozenset(self._params[0].all_stop_token_ids)
        self._limit = self._engine.vllm_config.model_config.max_model_len
        self._window = self.arguments["max_num_seqs"] + AHEAD
        self.load = Load(self.arguments["max_num_seqs"])
        self._request = _request_kind()
        self.start_s = time.monotonic() - started

    def _assert_in_force(self) -> None:
        found = self._engine.vllm_config
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            asked, given = self.arguments[name], getattr(found.scheduler_config, name)
            if asked != given:
                fix = f"set model.{name} to {given}"
                raise EngineError(f"vLLM runs with another {name} than asked", value=f"asked {asked}, runs {given}", fix=fix)
        outputs = found.structured_outputs_config
        if (outputs.backend, outputs.disable_any_whitespace) != (BACKEND, True):
            found_value = f"{outputs.backend}, disable_any_whitespace={outputs.disable_any_whitespace}"
            raise EngineError("vLLM runs with another grammar backend than asked", value=found_value)

    def _prepared(self, params: Any, n: int) -> list[Any]:
        """The sampling of each of `n` samples as vLLM's core takes it: checked and completed by vLLM once, not per row."""
        prompt = {"type": "token", "prompt_token_ids": self._encoder.chats([_PROBE])[0]}
        tasks = self._engine.get_supported_tasks()
        try:
            first = self._engine.input_processor.process_inputs("probe", prompt, params, tasks).sampling_params
        except ValueError as error:
            fix = "simplify the answer schema or change the task's sampling"
            raise ConfigError(f"vLLM cannot take this task: {error}", where="task.yaml", fix=fix) from None
        made = [first]
        for sample in range(1, n):  # as vLLM does it: with a seed, one more for each
            made.append(copy(first))
            if first.seed is not None:
                made[-1].seed = first.seed + sample
        return made

    def facts(self) -> dict[str, Any]:
        """What is in force, and how full the engine was so far."""
        found = self._engine.vllm_config
        import vllm

        return {
            "engine": "vllm",
            "version": vllm.__version__,
            "device": str(found.device_config.device_type),
            "dtype": str(found.model_config.dtype).removeprefix("torch."),
            "quantization": found.model_config.quantization,
            "max_model_len": found.model_config.max_model_len,
            "max_num_seqs": found.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": found.scheduler_config.max_num_batched_tokens,
            "kv_cache_blocks": found.cache_config.num_gpu_blocks,
            "kv_block_tokens": found.cache_config.block_size,
            "prefix_caching": found.cache_config.enable_prefix_caching,
            "enforce_eager": found.model_config.enforce_eager,
            "tensor_parallel": found.parallel_config.tensor_parallel_size,
            "structured_outputs": self._how_bound(),
            "threads": threads(self.config) if not self.config.gpus else None,
            "engine_process": self.apart,
            "samples": len(self._params),
            "start_s": round(self.start_s, 2),
            **self.load.figures(),
        }

    def _how_bound(self) -> str:
        found = self._params[0].structured_outputs
        return described(code=bool(found.grammar)) if found else "none"

    def generate(self, requests: Iterable[Request]) -> Generator[Completion]:
        """Completions as they finish. Pulls requests so that the engine always has some waiting."""
        flight = Flight(self._tokenizer, len(self._params), self._ends, self.top)
        try:
            with Ahead(self._encoder, requests) as ahead:
                last = time.monotonic()
                while ahead.more or flight:
                    # Wait for ids only when places would stay empty: some milliseconds against a step's tens.
                    while len(flight) < self._window and (asked := ahead.take(wait=len(flight) < self.load.slots)):
                        if failed := self._add(flight, *asked):
                            yield failed
                    if flight:
                        begun = time.monotonic()
                        outputs = self._outputs()
                        now = time.monotonic()
                        self.load.step(len(outputs), now - last, now - begun, fed=ahead.more)
                        last = now
                        for row in flight.take(outputs):
                            self.load.row(row.tokens_in, row.cached)
                            yield flight.completion(row)
        finally:
            if flight:
                self._core.abort_requests(flight.names())

    def _add(self, flight: Flight, request: Request, prompt: list[int], problem: str) -> Completion | None:
        if not problem and request.id in flight:
            problem = f"two requests with the id {request.id} at once"
        if problem := problem or unfit(prompt, self._limit):
            return Completion(request.id, finish_reason="error", error=problem)
        for name, params in zip(flight.add(request.id, len(prompt)), self._params, strict=True):
            self._core.add_request(self._request(name, prompt, None, params, None, 0.0, None, None, None))
        return None

    def _outputs(self) -> Any:
        """What the core made of one step. Raises when the core's process is dead: vLLM itself would wait for ever."""
        if not self.apart:
            return self._core.get_output().outputs
        while True:
            try:
                found = self._core.outputs_queue.get(timeout=_LOOK_S)
            except queue.Empty:
                self._core.ensure_alive()
                continue
            if isinstance(found, Exception):
                raise found
            return found.outputs

    def core_pids(self) -> list[int]:
        """Processes of the engine's core; none when it is in this one."""
        return [process.pid for process in self._core.resources.engine_manager.processes] if self.apart else []

    def close(self) -> None:
        self._core.shutdown()
        if self._guard is not None:  # vLLM leaves its sockets' context to the garbage collector, with two threads for each engine
            self._core.output_queue_thread.join(timeout=5)
            self._core.ctx.destroy(linger=0)
            self._guard.release()
        del self._core, self._engine
        gc.collect()


def _start(config: ModelConfig, found: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and vLLM's deprecations are theirs
        import torch

        if not config.gpus:
            torch.set_num_threads(threads(config))  # also when torch was imported before the environment was set
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.executor import Executor

        try:
            made = EngineArgs(**found).create_engine_config(UsageContext.LLM_CLASS)
            # not from_engine_args: it goes by an environment variable that vLLM reads once per process
            return LLMEngine(made, Executor.get_class(made), log_stats=False, multiprocess_mode=apart(config))
        except Exception as error:
            fix = "headtail doctor checks versions, GPU and memory; lower kv_cache_gib or gpu_memory_utilization if memory is short"
            raise EngineError(f"vLLM did not start: {type(error).__name__}: {error}", where=found["model"], fix=fix) from error


def _request_kind() -> Any:
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest


def sampling_params(sampling: dict[str, Any], grammar: dict[str, str], top: int = 0) -> Any:
    """vLLM's words for a task's sampling, of one sample; `grammar` as `grammar.told` has it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        max_tokens=sampling["max_tokens"],
        seed=sampling.get("seed"),
        logprobs=top,  # beside the sampled token's
        flat_logprobs=True,
        detokenize=False,  # once per row when it is finished, not once per token: see token_texts
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(**grammar) if grammar else None,
    )
