"""The protocol of inference engines: messages in, completions out, as they finish.

In: an iterable of Requests. Out: one Completion per Request, in any order; a row that fails is a Completion with
`error`, never an exception. Models in process (vLLM; transformers for small students; encoders by what their folder says),
OpenAI-compatible HTTP, and a null engine to measure our own overhead. Knows nothing of tasks, stores or ledgers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field, field_validator

from headtail.core.config import Config, execution


class EngineTraits(NamedTuple):
    """What others must know of an engine before it is started, or imported: so they are here and not in its module.

    `in_process`: it loads the weights itself, so the model's folder says how it is asked. `endpoint`: another machine answers; it
    has time limits of its own, and its owner bills.
    """

    in_process: bool
    endpoint: bool


ENGINES = {
    "vllm": EngineTraits(in_process=True, endpoint=False),
    "transformers": EngineTraits(in_process=True, endpoint=False),
    "openai": EngineTraits(in_process=False, endpoint=True),
    "null": EngineTraits(in_process=False, endpoint=False),
}


class ModelConfig(Config):
    """A model and the engine that runs it."""

    model: str = Field(
        "example:teacher",
        min_length=1,
        description="hub id, local folder, store path of a student (distill/...), or a shipped one (example:teacher)",
    )
    engine: Literal["vllm", "transformers", "openai", "null"] = Field(
        "vllm",
        description="vllm: in process (a student that is not a decoder runs in its own engine, as its folder says); "
        "transformers: in process, rows of a batch generated together: faster for students of a few million weights on CPU; "
        "openai: any OpenAI-compatible endpoint; null: no model, for measuring overhead",
    )
    revision: str = Field("", description="hub revision (commit); required for a hub id, so that a key means one set of weights")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="weights and activations; auto: as stored on a GPU; on a CPU bfloat16 where the CPU computes it, else float32"
    )
    quantization: str = Field("", description="vLLM quantization such as fp8; empty for none")
    max_model_len: int = Field(1024, ge=32, description="tokens of prompt plus answer; longer prompts end as failed rows")
    system_role: Literal["keep", "merge"] = Field(
        "keep",
        description="merge: put the system message before the first user message, for models without a system role (Gemma, Mistral)",
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        description="openai: name of the token limit in a request; OpenAI's reasoning models need max_completion_tokens",
    )
    ask_logprobs: bool = Field(
        True, description="openai: ask for tokens' log-probs, from which confidence is computed; set it to false where the endpoint refuses"
    )
    base_url: str = Field("", description="openai: https://host/v1; the key comes from the environment (OPENAI_API_KEY)")
    key_hosts: tuple[str, ...] = execution(
        (), "openai: hosts that may get the key without https, such as vllm.internal; this machine and every https host may always get it"
    )
    tensor_parallel: int = execution(1, "GPUs that share one copy of the model", ge=1)
    gpus: float = execution(0, "GPUs per engine; 0 runs on CPU", ge=0)
    cpus: float = execution(1, "CPU cores asked of Ray per engine", ge=0)
    resources: dict[str, float] = execution(
        {}, "custom Ray resources asked per engine, such as {teacher: 1}: keeps it on that role's nodes"
    )
    max_num_seqs: int = execution(0, "rows decoded together; 0 chooses by device", ge=0)
    max_num_batched_tokens: int = execution(0, "tokens per engine step; 0 chooses by device", ge=0)
    kv_block_tokens: int = execution(
        0, "tokens per block of KV cache: prompts share whole blocks only; 0 chooses by device (CPU 32, GPU vLLM's own)", ge=0
    )
    engine_process: bool | None = execution(
        None,
        "vllm: the engine's core in its own process; null: yes on GPU, no on CPU (where it starts slower and is not faster)",
    )
    kv_cache_gib: float = execution(0.5, "CPU only: GiB of KV cache", gt=0)
    gpu_memory_utilization: float = execution(0.9, "share of GPU memory the engine takes", gt=0, le=1)
    request_timeout_s: float = execution(120.0, "openai: seconds after which a request counts as failed", gt=0)
    concurrency: int = execution(32, "openai: maximum of concurrent requests per worker; fewer while the endpoint answers 429 or 503", ge=1)
    requests_per_minute: int = execution(0, "openai: requests that each worker may send in a minute; 0 for no limit", ge=0)
    tokens_per_minute: int = execution(0, "openai: prompt and answer tokens that each worker may use in a minute; 0 for no limit", ge=0)
    usd_per_hour: float = execution(
        0.0, "price of one worker's machine, for cost figures; 0 prices at the default stated in docs/cost.md", ge=0
    )

    usd_per_million_tokens_in: float = execution(0.0, "a provider's price per million prompt tokens, in addition to usd_per_hour", ge=0)
    usd_per_million_tokens_out: float = execution(0.0, "a provider's price per million answer tokens, in addition to usd_per_hour", ge=0)

    @property
    def traits(self) -> EngineTraits:
        """What others must know of the engine."""
        return ENGINES[self.engine]

    @property
    def priced(self) -> bool:
        """Whether it is known what its answers cost: a model in this process costs its machine, an endpoint what its owner bills."""
        prices = (self.usd_per_hour, self.usd_per_million_tokens_in, self.usd_per_million_tokens_out)
        return not self.traits.endpoint or any(prices)

    @field_validator("engine", mode="before")
    @classmethod
    def _bare_null(cls, value: object) -> object:
        """YAML reads an unquoted null as nothing; here it is the engine of that name."""
        return "null" if value is None else value


@dataclass(frozen=True, slots=True)
class Request:
    """One row for an engine. `id` is the caller's and comes back on the Completion.

    `again`: the row failed before, so its failure says nothing about other rows. `sample`: nothing is known yet of the rows it is from.
    """

    id: int
    messages: Sequence[dict[str, str]]
    again: bool = False
    sample: bool = True


class Top(NamedTuple):
    """The k likeliest tokens at every token of an answer, its end included, after the grammar's mask and before temperature.

    `token_ids` (n) int32: the answer itself; `ids` (n, k) int32, likeliest first, and `logprobs` (n, k) float16, natural log.
    What the grammar forbids has the lowest float16.
    """

    token_ids: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine made of one Request.

    `token_texts` and `token_logprobs` have one entry per output token (natural log, after the grammar mask), or are
    empty when the engine gives none. `tokens_cached` of `tokens_in` were found in the engine's prefix cache.
    `samples` holds what the same request gave beyond the first when sampling asks for n > 1; the answer tokens of each
    are its own, the prompt's are counted once, on the first. `error` is empty on success; `transient` says that asking
    again may help, `passing` that asking again in a later run may.
    `no_text`: why `text` is empty, where the engine knows it. `top`: the likeliest tokens, when asked for.
    """

    id: int
    text: str = ""
    finish_reason: str = ""  # stop | length | content_filter | error
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    token_texts: tuple[str, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    error: str = ""
    transient: bool = False
    passing: bool = False
    samples: tuple[Completion, ...] = ()
    no_text: str = ""
    top: Top | None = field(default=None, compare=False)


class Engine(Protocol):
    """A started engine."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish; keeps the device busy by pulling requests ahead."""
        ...

    def facts(self) -> dict[str, Any]:
        """Engine arguments actually in force, for the receipt."""
        ...

    def close(self) -> None: ...


Bound = dict[str, Any] | str | None  # what answers are held to: a JSON Schema, a grammar in EBNF (in process alone), or nothing
