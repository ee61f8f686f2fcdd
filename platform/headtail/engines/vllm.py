"""vLLM in process: messages in, completions under the task's grammar out, with the device kept full.

In: Requests. Out: Completions with finish reason, token counts and the log-prob of each sampled token. Defaults are
chosen by device, read back from the started engine and asserted. A row that cannot be asked is a Completion with an
error; an engine that breaks raises. Knows nothing of tasks or retries.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headtail.engines import Completion, ModelConfig, Request
from headtail.engines.grammar import BACKEND, check, for_engine
from headtail.errors import ConfigError, EngineError

# Rows decoded together and tokens per step. CPU: measured on 2 cores (docs/engines.md); 2048 tokens, vLLM's own default
# for small machines, splits the first prompts over many steps. GPU: what keeps an H100-class card busy on short answers.
DEFAULTS = {"cpu": {"max_num_seqs": 256, "max_num_batched_tokens": 8192}, "gpu": {"max_num_seqs": 1024, "max_num_batched_tokens": 16384}}
_QUIET = ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "TOKENIZERS_PARALLELISM")
AHEAD = 64  # requests that wait inside the engine beyond those that run, so that a freed place is taken in the same step


def threads(config: ModelConfig) -> int:
    """CPU threads of one engine: the cores it was given, at least one."""
    return max(1, int(config.cpus))


def environment(config: ModelConfig) -> dict[str, str]:
    """What must be in the environment before torch and vLLM are imported."""
    found = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if config.gpus:
        return found
    return found | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: starts in seconds, and no second copy of every token
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding piles engines that share a machine onto the same cores
        "OMP_NUM_THREADS": str(threads(config)),  # Ray would set this to 1
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin made a shared 2-core machine ten times slower
    }


def arguments(config: ModelConfig, path: str) -> dict[str, Any]:
    """vLLM's engine arguments for `config` on the model at `path`. Serving uses the same."""
    device = "gpu" if config.gpus else "cpu"
    found: dict[str, Any] = {
        "model": path,
        "dtype": "bfloat16" if config.dtype == "auto" and device == "cpu" else config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs or DEFAULTS[device]["max_num_seqs"],
        "max_num_batched_tokens": config.max_num_batched_tokens or DEFAULTS[device]["max_num_batched_tokens"],
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
    if device == "cpu":
        return found | {"enforce_eager": True, "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
    return found | {"gpu_memory_utilization": config.gpu_memory_utilization}


class VllmEngine:
    """A started vLLM engine. `schema` None leaves answers free, for comparison."""

    def __init__(self, config: ModelConfig, path: str, schema: dict[str, Any] | None, sampling: dict[str, Any]) -> None:
        started = time.monotonic()
        for name, value in environment(config).items():
            if name in _QUIET:
                os.environ.setdefault(name, value)  # a person who asks for vLLM's logs gets them
            else:
                os.environ[name] = value
        if Path(path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        grammar = check(for_engine(schema, sampling["max_tokens"]), "task.yaml answer") if schema is not None else ""
        self.config, self.arguments = config, arguments(config, path)
        self._engine = _start(config, self.arguments)
        self._assert_in_force()
        self._tokenizer = self._engine.get_tokenizer()
        if not getattr(self._tokenizer, "chat_template", None):
            fix = "use an instruction-tuned model, or add chat_template.jinja"
            raise EngineError("the model's tokenizer has no chat template", where=path, fix=fix)
        self._params = sampling_params(sampling, grammar)
        self._verify()
        self._window = self.arguments["max_num_seqs"] + AHEAD
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

    def _verify(self) -> None:
        found = self._engine.vllm_config
        try:
            self._params.verify(found.model_config, found.speculative_config, found.structured_outputs_config, self._tokenizer)
        except ValueError as error:  # once here, else every row would fail with the same words
            fix = "simplify the answer schema or change the task's sampling"
            raise ConfigError(f"vLLM cannot take this task: {error}", where="task.yaml", fix=fix) from None

    def facts(self) -> dict[str, Any]:
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
            "structured_outputs": f"{BACKEND}, no free whitespace" if self._params.structured_outputs else "none",
            "threads": threads(self.config) if not self.config.gpus else None,
            "start_s": round(self.start_s, 2),
        }

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Pulls requests so that the engine always has some waiting."""
        source, more = iter(requests), True
        flying: dict[str, int] = {}
        try:
            while more or flying:
                while more and len(flying) < self._window:
                    request = next(source, None)
                    if request is None:
                        more = False
                    elif failed := self._add(request, flying):
                        yield failed
                for output in self._engine.step() if flying else ():
                    if output.finished:
                        yield self._completion(flying.pop(output.request_id), output)
        finally:
            if flying:
                self._engine.abort_request(list(flying))

    def _add(self, request: Request, flying: dict[str, int]) -> Completion | None:
        name = str(request.id)
        try:
            if name in flying:
                raise ValueError(f"two requests with the id {name} at once")
            ids = self._tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=True, return_dict=False)
            self._engine.add_request(name, {"type": "token", "prompt_token_ids": ids}, self._params)
        except Exception as error:  # whatever this one row did: too long, a template that raises; the others go on
            return Completion(request.id, finish_reason="error", error=f"{type(error).__name__}: {error}")
        flying[name] = request.id
        return None

    def _completion(self, row: int, output: Any) -> Completion:
        made = output.outputs[0]
        reason = str(made.finish_reason or "")
        texts = token_texts(self._tokenizer, made.token_ids)
        broken = reason not in ("stop", "length", "repetition")
        return Completion(
            id=row,
            text="".join(texts),
            finish_reason="length" if reason == "repetition" else reason,
            tokens_in=len(output.prompt_token_ids or ()),
            tokens_out=len(made.token_ids),
            token_texts=texts,
            token_logprobs=tuple(made.logprobs.logprobs) if made.logprobs is not None else (),
            error=f"the engine ended the request: {reason or 'no reason'}" if broken else "",
            transient=broken,
        )

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        del self._engine
        gc.collect()


def _start(config: ModelConfig, found: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and vLLM's deprecations are theirs
        import torch

        if not config.gpus:
            torch.set_num_threads(threads(config))  # also when torch was imported before the environment was set
        from vllm import EngineArgs, LLMEngine

        try:
            return LLMEngine.from_engine_args(EngineArgs(**found))
        except Exception as error:
            fix = "headtail doctor checks versions, GPU and memory; lower kv_cache_gib or gpu_memory_utilization if memory is short"
            raise EngineError(f"vLLM did not start: {type(error).__name__}: {error}", where=found["model"], fix=fix) from error


def sampling_params(sampling: dict[str, Any], grammar: str) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        max_tokens=sampling["max_tokens"],
        seed=sampling.get("seed"),
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        detokenize=False,  # once per row when it is finished, not once per token: see token_texts
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(json=grammar) if grammar else None,
    )


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds; together they spell the answer. A token that ends inside a character adds nothing yet."""
    from tokenizers.decoders import DecodeStream

    stream, inner = DecodeStream(skip_special_tokens=True), tokenizer._tokenizer
    return tuple(stream.step(inner, token) or "" for token in ids)
