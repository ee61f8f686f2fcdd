"""The live student: one vLLM engine in a Serve replica, and the door through which the ingress asks it.

In: a query and its side inputs. Out: a LiveReply: the text under the task's grammar, its confidence and answer_key, made
with the same prompt, grammar, sampling and key as `precompute` uses. Each failure of the replica is a LiveFailure with a
reason. Knows nothing of caches or HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headtail.engines import ModelConfig
from headtail.engines.grammar import check, for_engine
from headtail.errors import EngineError
from headtail.generate.job import answer_settings
from headtail.keys import answer_key, fingerprint
from headtail.models import find
from headtail.outcome import confidence
from headtail.serve.answerer import Live, LiveFailure, LiveReply
from headtail.storage import open_storage
from headtail.task import Task


class Student:
    """A started student. An instance is a Serve replica.

    `stands_for`: the release's student that it is deployed as; another model runs when the config names one.
    """

    def __init__(self, config: ModelConfig, root: str, task: Task, stands_for: str) -> None:
        from headtail.engines.vllm import arguments, environment, sampling_params

        os.environ.update(environment(config))  # before vLLM is imported
        found = find(config, open_storage(root))
        if Path(found.path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        sampling = task.file.sampling.model_dump()
        grammar = check(for_engine(task.schema, sampling["max_tokens"]), "task.yaml answer")
        self.task, self.stands_for = task, stands_for
        self._settings = fingerprint(answer_settings(task, config, found.digest))
        self._params = sampling_params(sampling, grammar)
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments(config, found.path)))
        except Exception as error:
            raise EngineError(f"the live student did not start: {error}", where=found.path, fix="headtail doctor") from error
        self._tokenizer = self._engine.get_tokenizer()
        self._numbers = itertools.count()

    async def answer(self, query: str, side_inputs: Mapping[str, Sequence[str]]) -> LiveReply:
        """The student's text for one query. A cancelled call is taken out of the engine."""
        from headtail.engines.vllm import token_texts

        messages = self.task.messages(query, side_inputs)
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        final: Any = None
        async for output in self._engine.generate({"prompt_token_ids": ids}, self._params, f"live-{next(self._numbers)}"):
            final = output
        made = final.outputs[0]
        texts = token_texts(self._tokenizer, made.token_ids)
        text = "".join(texts)
        sure = confidence(text, texts, tuple(made.logprobs.logprobs) if made.logprobs is not None else ())
        key = answer_key(messages, self._settings).hex()
        return LiveReply(text, str(made.finish_reason), sure, key, self.stands_for, self.task.fingerprint)

    async def reconfigure(self, warm_up: dict[str, str]) -> None:
        """Called by Serve before the replica counts as ready: one answer, or the first caller waits 2 s for the grammar."""
        await self.answer(warm_up["query"], {})

    async def check_health(self) -> None:
        """Raises when the engine is dead, so that Serve replaces the replica."""
        await self._engine.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()


def door(handle: Any) -> Live:
    """A function over a Serve handle that turns every way in which Serve fails into a LiveFailure."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

    gone = (ActorDiedError, ActorUnavailableError, RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)

    async def ask(query: str, side_inputs: Mapping[str, Sequence[str]]) -> LiveReply:
        response = handle.answer.remote(query, {name: list(values) for name, values in side_inputs.items()})
        try:
            return LiveReply(*await response)
        except BackPressureError:
            raise LiveFailure("overloaded") from None
        except gone:
            raise LiveFailure("unavailable") from None
        except asyncio.CancelledError:
            response.cancel()  # late, or the caller left: do not let the student go on with it
            raise

    return ask
