"""vLLM through its public API: messages in, completions under the task's grammar out, with the device kept busy.

In: Requests, or single prompts of many callers. Out: Completions with finish reason, token counts and the log-prob of each sampled
token, for every sample. Batch and serving use the same LLMEngine in a thread of its own (engine_thread). Prompts become ids on another
thread, and rows always wait inside, so that a place that becomes free is taken in the next step. Defaults are chosen by device, read
back from the started engine and asserted. A row that vLLM refuses is a Completion with an error; an engine that breaks raises.
Knows nothing of tasks or retries.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import time
import warnings
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headtail.core.errors import ConfigError, EngineError
from headtail.engines.base import Bound, Completion, ModelConfig, Request, Top
from headtail.engines.control import Chat, Encoder
from headtail.engines.device import SPINS, allow_amx, precision, threads
from headtail.engines.engine_thread import EngineThread, RowRefused
from headtail.engines.grammar import BACKEND, describe_bound, ebnf
from headtail.engines.load import Load
from headtail.engines.orphans import Guard
from headtail.engines.tokens import TokenizeAhead, answer_texts, length_problem
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
LOWEST = float(np.finfo(np.float16).min)  # stands for minus infinity, which would make NaN of a chance of 0 times it
_PROBE = ({"role": "user", "content": "x"},)


def has_engine_process(config: ModelConfig) -> bool:
    """Whether the engine's core gets a process of its own."""
    return bool(config.gpus) if config.engine_process is None else config.engine_process


def engine_environment(config: ModelConfig) -> dict[str, str]:
    """What must be in the environment before torch and vLLM are imported."""
    found = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # `engine_process` decides; vLLM reads this once per process
    if config.gpus:
        return found
    return found | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding piles engines that share a machine onto the same cores
        "OMP_NUM_THREADS": str(threads(config)),  # Ray would set this to 1
        "GOMP_SPINCOUNT": SPINS,
        "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles the ranks of log-probabilities with g++: 13 s at the first row, and nothing gained
    }


def batch_limits(config: ModelConfig) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) where the config leaves them to us."""
    if not config.gpus:
        return CPU_ROOM
    from vllm.platforms import current_platform

    large = current_platform.get_device_total_memory() >= LARGE_GPU_BYTES and "a100" not in current_platform.get_device_name().lower()
    return LARGE_GPU_ROOM if large else GPU_ROOM


def engine_arguments(config: ModelConfig, path: str) -> dict[str, Any]:
    """vLLM's engine arguments for `config` on the model at `path`. Serving uses the same."""
    seqs, tokens = batch_limits(config) if not (config.max_num_seqs and config.max_num_batched_tokens) else (0, 0)
    arguments: dict[str, Any] = {
        "model": path,
        "dtype": precision(config),
        "trust_remote_code": False,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs or seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens or tokens,
        "enable_prefix_caching": True,
        "structured_outputs_config": {"backend": BACKEND},
        "generation_config": "vllm",  # sampling is the task's, not the model folder's
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if config.quantization:
        arguments["quantization"] = config.quantization
    if config.revision and not Path(path).is_dir():
        arguments["revision"] = config.revision
    if config.gpus:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        return arguments | ({"block_size": config.kv_block_tokens} if config.kv_block_tokens else {})
    arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
    return arguments | {"block_size": config.kv_block_tokens or CPU_BLOCK}


def check_architecture(folder: Path) -> None:
    """ConfigError when a model's folder does not name its class: vLLM then guesses one, for Gemma 3 an embedding model."""
    file = folder / "config.json"
    if not json.loads(file.read_text(encoding="utf-8")).get("architectures"):
        fix = 'add "architectures": ["Gemma3ForCausalLM"], or the class that it is; a model that transformers saves has it'
        raise ConfigError("the model's folder does not name its architecture", where=str(file), fix=fix)


class VllmEngine:
    """A started vLLM engine. `bound` None leaves answers free, for comparison; `top` of the likeliest tokens come with each token."""

    def __init__(self, config: ModelConfig, path: str, bound: Bound, sampling: dict[str, Any], top: int = 0) -> None:
        started = time.monotonic()
        for name, value in engine_environment(config).items():
            if name in _YOURS:
                os.environ.setdefault(name, value)  # a person who asks for vLLM's logs gets them
            else:
                os.environ[name] = value
        if Path(path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            check_architecture(Path(path))
        grammar, self._bound = ebnf(bound, sampling["max_tokens"], "task.yaml answer"), bound
        self.config, self.arguments, self.apart, self.top = config, engine_arguments(config, path), has_engine_process(config), top
        if top:
            self.arguments["max_logprobs"] = top  # vLLM's own limit is 20
        self._thread = EngineThread(lambda: _start(config, self.arguments), self.arguments["max_num_seqs"], _refusals())
        self._guard = Guard(self.core_pids()) if self.core_pids() else None
        try:
            self._prepare(path, sampling, grammar)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - started

    def _prepare(self, path: str, sampling: dict[str, Any], grammar: str) -> None:
        self._vllm_config = self._thread.engine.vllm_config
        self._assert_in_force()
        self._tokenizer = self._thread.engine.get_tokenizer()
        if not getattr(self._tokenizer, "chat_template", None):
            fix = "use an instruction-tuned model, or add chat_template.jinja"
            raise EngineError("the model's tokenizer has no chat template", where=path, fix=fix)
        self._encoder = Encoder(self._tokenizer, self.config.system_role)
        self._params = self._checked_sampling(sampling, grammar)
        self._limit = self._vllm_config.model_config.max_model_len
        self._thread.load = Load(self.load.slots)  # without the probe

    @property
    def load(self) -> Load:
        """How full the engine was."""
        return self._thread.load

    def _assert_in_force(self) -> None:
        found = self._vllm_config
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            asked, given = self.arguments[name], getattr(found.scheduler_config, name)
            if asked != given:
                fix = f"set model.{name} to {given}"
                raise EngineError(f"vLLM runs with another {name} than asked", value=f"asked {asked}, runs {given}", fix=fix)
        if (backend := found.structured_outputs_config.backend) != BACKEND:
            raise EngineError("vLLM runs with another grammar backend than asked", value=backend)

    def _checked_sampling(self, sampling: dict[str, Any], grammar: str) -> Any:
        """The sampling of every row, after vLLM wrote one token of a row with it."""
        try:
            params, probe = (sampling_params(sampling | change, grammar, self.top) for change in ({}, {"max_tokens": 1}))
            self._thread.submit(_prompt(self._encoder.chats([_PROBE])[0]), probe).result()
        except _refusals() as error:  # RowRefused is a ValueError
            fix = "simplify the answer schema or change the task's sampling"
            raise ConfigError(f"vLLM does not accept this task: {error}", where="task.yaml", fix=fix) from None
        return params

    def facts(self) -> dict[str, Any]:
        """Arguments in use, and how full the engine was so far."""
        config = self._vllm_config
        import vllm

        return {
            "engine": "vllm",
            "version": vllm.__version__,
            "device": str(config.device_config.device_type),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "kv_cache_blocks": config.cache_config.num_gpu_blocks,
            "kv_block_tokens": config.cache_config.block_size,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "enforce_eager": config.model_config.enforce_eager,
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "structured_outputs": describe_bound(self._bound),
            "threads": threads(self.config) if not self.config.gpus else None,
            "engine_process": self.apart,
            "samples": self._params.n,
            "start_s": round(self.start_s, 2),
            **self.load.figures(),
        }

    def generate(self, requests: Iterable[Request]) -> Generator[Completion]:
        """Completions as they finish. Pulls requests so that the engine always has some waiting."""
        finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        waiting: dict[Future[Any], int] = {}  # with the row's id
        samples, slots = self._params.n, self.load.slots
        try:
            with TokenizeAhead(self._encoder, requests) as ahead:
                while ahead.more or waiting:
                    # Wait for ids only when places would stay empty: some milliseconds against a step's tens.
                    while len(waiting) * samples < slots + AHEAD and (made := ahead.take(wait=len(waiting) * samples < slots)):
                        request, prompt, problem = made
                        if problem := problem or length_problem(prompt, self._limit):
                            yield Completion(request.id, finish_reason="error", error=problem)
                            continue
                        future = self._thread.submit(_prompt(prompt), self._params)
                        waiting[future] = request.id
                        future.add_done_callback(finished.put)
                    self._thread.fed = ahead.more
                    if waiting:
                        future = finished.get()
                        yield self.completion(waiting.pop(future), future)
        finally:
            for future in waiting:
                future.cancel()

    def submit(self, messages: Chat) -> Future[Any]:
        """A Future of one prompt's result, for any thread; `completion` reads it when it is done. A cancelled one ends its row."""
        return self._thread.submit(_prompt(self._encoder.chats([messages])[0]), self._params)

    def check(self) -> None:
        """EngineStopped when the engine is dead."""
        if self._thread.error is not None:
            raise self._thread.error

    def completion(self, row: int, future: Future[Any]) -> Completion:
        """The result of a row whose Future is done. EngineStopped when the engine died."""
        try:
            completion = completion_of_output(row, future.result(), self._tokenizer, self.top)
        except RowRefused as error:
            return Completion(row, finish_reason="error", error=str(error))
        self.load.row(completion.tokens_in, completion.tokens_cached)
        return completion

    def core_pids(self) -> list[int]:
        """Processes of the engine's core; none when it is in this one."""
        return [process.pid for process in self._thread.processes if process.pid is not None]

    def close(self) -> None:
        self._thread.close()
        self._thread.engine.engine_core.shutdown()  # LLMEngine has no method for it
        if self._guard is not None:
            self._guard.release()
        del self._thread
        gc.collect()


def completion_of_output(row: int, output: Any, tokenizer: Any, top: int = 0) -> Completion:
    """What a RequestOutput of vLLM says, asked for `top` of the likeliest tokens. Its first sample is the answer."""
    first, *others = (_sample_of(row, sample, tokenizer, top) for sample in output.outputs)
    return replace(first, tokens_in=len(output.prompt_token_ids), tokens_cached=output.num_cached_tokens or 0, samples=tuple(others))


def _sample_of(row: int, sample: Any, tokenizer: Any, top: int) -> Completion:
    ids, reason = list(sample.token_ids), str(sample.finish_reason)
    texts = answer_texts(tokenizer, ids, stopped=reason == "stop")
    broken = reason not in ("stop", "length", "repetition")
    return Completion(
        id=row,
        text="".join(texts),
        finish_reason="length" if reason == "repetition" else reason,
        tokens_out=len(ids),
        token_texts=texts,
        token_logprobs=tuple(sample.logprobs.logprobs[:: top + 1]),  # flat lists: of each token the sampled one, then the likeliest
        error=f"the engine ended the request: {reason}" if broken else "",
        transient=broken,
        top=_likeliest(ids, sample.logprobs, top) if top and ids else None,
    )


def _likeliest(ids: list[int], flat: Any, top: int) -> Top:
    """The likeliest tokens, in the types they are stored in."""
    tokens = np.array(flat.token_ids, np.int32).reshape(len(ids), top + 1)[:, 1:]
    logprobs = np.array(flat.logprobs, np.float32).reshape(len(ids), top + 1)[:, 1:]
    return Top(np.array(ids, np.int32), tokens, logprobs.clip(min=LOWEST).astype(np.float16))


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take."""
    from vllm.exceptions import VLLMClientError

    return ValueError, VLLMClientError


def _prompt(ids: list[int]) -> Any:
    from vllm.inputs import tokens_input

    return tokens_input(ids)


def _start(config: ModelConfig, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and vLLM's deprecations are theirs
        import torch

        if not config.gpus:
            torch.set_num_threads(threads(config))  # also when torch was imported before the environment was set
            if not allow_amx() and settings["dtype"] == "bfloat16":  # an engine's process of its own asks as a plugin: pyproject.toml
                what = "Linux does not let this process use the CPU's AMX, with which vLLM computes bfloat16"
                raise ConfigError(what, where="model.dtype", value=config.dtype, fix="set float32")
        from vllm import EngineArgs, LLMEngine

        try:
            return LLMEngine.from_engine_args(EngineArgs(**settings), enable_multiprocessing=has_engine_process(config))
        except Exception as error:
            fix = "headtail doctor checks versions, GPU and memory; lower kv_cache_gib or gpu_memory_utilization if memory is short"
            raise EngineError(f"vLLM did not start: {type(error).__name__}: {error}", where=settings["model"], fix=fix) from error


def sampling_params(sampling: dict[str, Any], grammar: str, top: int = 0) -> Any:
    """vLLM's words for a task's sampling; `grammar` in EBNF. One of `_refusals` when vLLM refuses it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        n=int(sampling.get("n", 1)),
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        max_tokens=sampling["max_tokens"],
        seed=sampling.get("seed"),
        logprobs=top,  # beside the sampled token's
        flat_logprobs=True,
        detokenize=False,  # once per row when it is finished, not once per token: see token_texts
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(grammar=grammar) if grammar else None,
    )
