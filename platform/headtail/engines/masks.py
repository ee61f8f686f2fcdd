"""Grammar masks for a whole step at once, in vLLM on CPU: a scheduler that fills them, a worker that applies them.

vLLM fills them row by row from Python and applies them with xgrammar's CPU kernel, one bit after the other: 3.5 ms of a
22 ms step of 256 rows, more than the rest of constrained decoding together. Here one call of xgrammar fills a step's masks
and NumPy unpacks them: 1.3 ms, the same masks, the same tokens. vLLM takes both classes by name (scheduler_cls,
worker_cls). On GPU vLLM's own way stays: it overlaps with the forward pass there, and ours was never run on one.
"""

from __future__ import annotations

from typing import Any

import torch
import xgrammar
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.cpu_worker import CPUWorker

from headtail.engines.grammar import apply as apply

THREADS = 1  # for 256 rows and 2048 tokens one thread took 0.10 ms, two took 0.16


class BatchedScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler; only how masks are filled differs."""

    _batch: Any = None
    _masks: Any = None

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """The masks of the rows that this step samples for, in a GrammarOutput; None when no row has a grammar."""
        manager = self.structured_output_manager
        if scheduler_output.scheduled_spec_decode_tokens or manager.reasoner_cls is not None:
            return super().get_grammar_bitmask(scheduler_output)  # more than one mask per row, or none: vLLM's own way
        names: list[str] = []
        matchers, places, free = [], [], []
        for name in scheduler_output.num_scheduled_tokens if scheduler_output.has_structured_output_requests else ():
            request = self.requests.get(name)
            if request is None or not request.use_structured_output or request.is_prefill_chunk:
                continue
            grammar = request.structured_output_request.grammar
            if grammar.is_terminated():
                free.append(len(names))
            else:
                matchers.append(grammar.matcher)
                places.append(len(names))
            names.append(name)
        if not names:
            return None
        if self._batch is None:
            self._batch = xgrammar.BatchGrammarMatcher(THREADS)
            self._masks = manager.backend.allocate_token_bitmask(self.vllm_config.scheduler_config.max_num_seqs)
        if matchers:
            self._batch.batch_fill_next_token_bitmask(matchers, self._masks, places)
        self._masks[free] = -1
        return GrammarOutput(names, self._masks[: len(names)].numpy())


class MaskingWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker; only how masks are applied differs."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Mask the step's logits, then sample as vLLM does."""
        state = self.model_runner.execute_model_state
        if grammar_output is not None and state is not None and not state.scheduler_output.scheduled_spec_decode_tokens:
            place = self.model_runner.input_batch.req_id_to_index
            with torch.inference_mode():
                apply(state.logits, [place[name] for name in grammar_output.structured_output_request_ids], grammar_output.grammar_bitmask)
            grammar_output = None
        return super().sample_tokens(grammar_output)
