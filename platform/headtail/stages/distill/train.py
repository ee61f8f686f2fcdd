"""What each training worker does: DeepSpeed steps over its share of the batches, checkpoints, and the finished weights.

In: a Spec (where examples and base are, the learner, the config). Out: in the store, `work/trained` (adapter or full
weights, written by rank 0) and, last, `work/done.json`. Runs inside Ray Train's worker group on GPUs (nccl) or CPUs (gloo).
Killed at any step, it goes on from the last complete checkpoint and makes the same steps as if nothing had happened. Knows
nothing of tasks or prompts, nor of what kind of student learns.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from headtail.adapters.storage import Storage, column_bytes, fetch_folder, put_folder, read_table, write_json, write_table
from headtail.core.errors import TrainingError
from headtail.engines.models import check_weights, resolve_weights
from headtail.stages.distill import logits, zero
from headtail.stages.distill.batches import Batch, Columns, epoch_seed, example_columns, plan_epoch, steps_of
from headtail.stages.distill.checkpoints import Checkpoints
from headtail.stages.distill.learner import Learner
from headtail.stages.distill.run_record import BestWeights, LoopRecord, LossPoint, TrainedRun, TrainingMakeup

if TYPE_CHECKING:
    from headtail.stages.distill.stage import Config, Lora

ALIKE = 0.9  # cosine: 0.996 between symbols that the shipped base never saw, at most 0.67 in Gemma 3


class Spec(NamedTuple):
    """All that a worker needs. Picklable."""

    store: Storage
    work: str  # folder in the store
    learner: Learner
    base_files: tuple[str, ...]  # store paths of a base that was made for this run, or empty: every worker finds base.model itself
    pad: int
    config: Config
    meter: Any
    base_digest: str = ""  # of base.model and logits.teacher, where the run was started
    teacher_digest: str = ""
    data: str = ""  # digest of the examples

    @property
    def examples(self) -> str:
        """The table of examples, in the store."""
        return f"{self.work}/examples.parquet"

    @property
    def taught(self) -> str:
        """The same examples as the teacher of `logits` is to read them; not there when it reads those."""
        return f"{self.work}/taught.parquet"

    @property
    def done(self) -> str:
        """Written when the weights are whole: history, files, tokens."""
        return f"{self.work}/done.json"


def train_worker(spec: Spec) -> None:
    """One rank's whole run."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if spec.config.gpus_per_worker else "cpu")
    import torch
    from ray import train

    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    if not spec.config.gpus_per_worker:
        torch.set_num_threads(max(1, int(spec.config.cpus_per_worker)))
    torch.manual_seed(spec.config.seed)
    with tempfile.TemporaryDirectory(prefix="headtail-train-") as scratch:
        table = read_table(spec.store, spec.examples)
        if spec.config.logits is not None and spec.config.logits.teacher:
            table = add_teacher_logits(spec, spec.config.logits, table, rank, world)
        engine = zero.start_engine(_model(spec, Path(scratch)), spec.config)
        held = table["held_out"].to_numpy()
        Run(spec, engine, rank, world, example_columns(table.filter(~held)), example_columns(table.filter(held)), Path(scratch)).train()
    torch.distributed.barrier()


def add_teacher_logits(spec: Spec, config: logits.Logits, table: pa.Table, rank: int, world: int) -> pa.Table:
    """The examples with the teacher's likeliest tokens. Each rank asks the teacher for its share, once, and stores it."""
    import torch

    from headtail.stages.distill.base import load_base

    mine = f"{spec.work}/logits-{rank:05}-of-{world:05}.parquet"
    if not spec.store.exists(mine):
        found = check_weights(resolve_weights(config.teacher, config.revision, spec.store), spec.teacher_digest)
        device = "cuda" if spec.config.gpus_per_worker else "cpu"
        read = read_table(spec.store, spec.taught) if spec.store.exists(spec.taught) else table
        share = read.take(np.arange(rank, table.num_rows, world))
        write_table(spec.store, mine, logits.top_k(load_base(found.path, config.revision)[0], share, config.k, spec.pad, device))
        if device == "cuda":
            torch.cuda.empty_cache()
    torch.distributed.barrier()
    parts = [read_table(spec.store, f"{spec.work}/logits-{i:05}-of-{world:05}.parquet") for i in range(world)]
    dealt = np.argsort(np.concatenate([np.arange(i, table.num_rows, world) for i in range(world)]), kind="stable")
    both = pa.concat_tables(parts).take(dealt)
    for name in logits.COLUMNS:
        table = table.append_column(name, both[name])
    return table


@dataclass
class LoopState:
    """Where the loop is and what it saw, as `LoopRecord`; `losses` may still be on the device, `seconds` are those before this process."""

    step: int
    history: list[LossPoint]
    losses: list[Any]
    best: BestWeights | None
    patience: int
    seconds: float

    @classmethod
    def resume(cls, record: LoopRecord) -> Self:
        """The loop where a checkpoint left it."""
        return cls(record.step, list(record.history), list(record.losses), record.best, record.patience, record.seconds)

    def record(self, seconds: float) -> LoopRecord:
        """What a checkpoint keeps; `seconds`: of training so far."""
        losses = tuple(float(loss) for loss in self.losses)
        history, best, patience = tuple(self.history), self.best, self.patience
        return LoopRecord(step=self.step, history=history, losses=losses, best=best, patience=patience, seconds=seconds)


class Run:
    """One rank's loop."""

    def __init__(self, spec: Spec, engine: Any, rank: int, world: int, trained: Columns, held: Columns, scratch: Path) -> None:
        self.spec, self.engine, self.rank, self.world, self.trained, self.held = spec, engine, rank, world, trained, held
        self.config, self.scratch = spec.config, scratch
        self.cut = {"rows": self.config.batch_rows, "workers": world, "tokens": self.config.batch_tokens}
        each = steps_of(lambda n: self._epoch_rows(n)["length"], seed=self.config.seed, epochs=self.config.epochs, **self.cut)
        self.ends = list(itertools.accumulate(each))
        self.steps = min(self.ends[-1], self.config.max_steps or self.ends[-1])
        self.stopping = self.config.early_stopping
        self.state = LoopState(0, [], [], None, 0, 0.0)
        self.own = {"real_tokens": 0, "tokens": 0, "rows": 0}
        made = TrainingMakeup(
            zero_stage=self.config.zero_stage,
            precision=self.config.precision,
            lora=self.config.lora and self.config.lora.model_dump(mode="json"),
            workers=world,
            data=spec.data,
        )
        self.checkpoints = Checkpoints(spec.store, spec.work, scratch, rank, world, self.config.lora is not None, made)
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training up to here, those before a resume included."""
        return self.state.seconds + time.monotonic() - self.started

    def train(self) -> None:
        """All steps from the last complete checkpoint on, then the weights and `done.json`."""
        found = self.checkpoints.load(self.engine)
        if found is not None:
            self.state, self.own = LoopState.resume(found[0]), found[1]
        self.engine.train()  # from_pretrained leaves it in eval mode: no dropout until somebody says so
        self.started = time.monotonic()
        stopped = self._stops()
        while self.state.step < self.steps and not stopped:
            self._step()
            step = self.state.step
            due = self.stopping is not None and step % self.stopping.every == 0
            if due or step % self.config.log_steps == 0 or step == self.steps:
                self._point(due or step == self.steps)
                stopped = self._stops()
            if step % self.config.checkpoint_steps == 0 and step < self.steps and not stopped:
                self.checkpoints.save(self.engine, step, self.state.record(self.seconds), self.own, self.steps)
                self._forget_worse()
        self._finish(stopped)

    def _step(self) -> None:
        import torch

        step = self.state.step
        rate = learning_rate(step, self.steps, self.config.learning_rate, self.config.warmup_share)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(step)
        total, weight = self.spec.learner.loss(self.engine, self._tensors(batch))
        sums = torch.stack([total.detach().float(), weight.detach().float()])
        torch.distributed.all_reduce(sums)
        whole = sums[1].clamp(min=1e-6)
        self.engine.backward(total * (self.world / whole))  # DeepSpeed takes the mean over ranks: the gradient is that of the whole step
        self.engine.step()
        self.state.losses.append(sums[0] / whole)
        self.state.step = step + 1
        self.own["real_tokens"] += batch.real_tokens
        self.own["tokens"] += batch.tokens
        self.own["rows"] += len(batch.arrays["weight"])
        self.spec.meter.add.remote(done={self.rank: self.own["rows"]})

    def _batch(self, step: int) -> Batch:
        """This rank's batch of a step."""
        number = bisect.bisect_right(self.ends, step)
        begin = self.ends[number - 1] if number else 0
        rows, plan = self._epoch(number)
        return self._collate(rows, plan[step - begin])

    @lru_cache(maxsize=1)  # noqa: B019  # one run per process
    def _epoch(self, number: int) -> tuple[Columns, list[list[np.ndarray]]]:
        """The rows as an epoch shows them, and its batches: planned by what is shown, so that little of them is padding."""
        rows = self._epoch_rows(number)
        return rows, plan_epoch(rows["length"], seed=epoch_seed(self.config.seed, number), **self.cut)

    def _epoch_rows(self, number: int) -> Columns:
        return self.spec.learner.epoch_rows(self.trained, epoch_seed(self.config.seed, number))

    def _collate(self, rows: Columns, parts: list[np.ndarray]) -> Batch:
        mine = parts[self.rank]
        if len(mine):
            return self.spec.learner.collate(rows, mine, rows["weight"][mine], self.spec.pad)
        return self.spec.learner.collate(rows, parts[0][:1], np.zeros(1, np.float32), self.spec.pad)  # fewer rows than workers

    def _tensors(self, batch: Batch) -> dict[str, Any]:
        import torch

        return {name: torch.from_numpy(array).to(self.engine.device) for name, array in batch.arrays.items()}

    def _point(self, judged: bool) -> None:
        """A point of the loss curve; with early stopping and `judged`, also a verdict on the weights."""
        step, losses = self.state.step, [float(loss) for loss in self.state.losses]
        loss = float(np.mean(losses)) if losses else float("nan")
        if losses and not math.isfinite(loss):
            raise TrainingError("the loss is no longer a number", where=f"step {step}", fix="lower learning_rate")
        point = LossPoint(step=float(step), loss=loss, eval_loss=self._evaluate(), seconds=self.seconds)
        self.state.history.append(point)
        self.state.losses = []
        if self.stopping is None or not judged:
            return
        best = self.state.best
        if best is None or point.eval_loss < best.eval_loss - self.stopping.min_delta:
            files = self._save(f"best/step-{step:08}")
            self.state.best, self.state.patience = BestWeights(step=step, eval_loss=point.eval_loss, files=tuple(files)), 0
        else:
            self.state.patience += 1

    def _stops(self) -> bool:
        return self.stopping is not None and self.state.patience >= self.stopping.patience

    def _evaluate(self) -> float:
        """Mean loss per thing to learn on the held-out rows, over all ranks."""
        import torch

        sums = torch.zeros(2, device=self.engine.device)
        if not len(self.held["length"]):
            return float("nan")
        self.engine.eval()
        with torch.no_grad():
            for batch in self._held_out_batches():
                total, weight = self.spec.learner.loss(self.engine, self._tensors(batch))
                sums += torch.stack([total.float(), weight.float()])
        self.engine.train()
        torch.distributed.all_reduce(sums)
        torch.distributed.broadcast(sums, 0)  # one verdict for all ranks, to the last bit
        return float(sums[0] / sums[1].clamp(min=1e-6))

    def _held_out_batches(self) -> Iterator[Batch]:
        for parts in plan_epoch(self.held["length"], seed=0, **self.cut):
            yield self._collate(self.held, parts)

    def _save(self, name: str) -> list[str]:
        """Adapter (LoRA) or whole model, moved into the store as `work/<name>`; all ranks call it, rank 0 gets the files."""
        lora = self.config.lora is not None
        state = zero.gather_weights(self.engine.module, self.config.zero_stage, lora, keep=self.rank == 0)
        if state is None:
            return []
        folder = self.scratch / "weights"
        shutil.rmtree(folder, ignore_errors=True)
        self.engine.module.save_pretrained(folder, state_dict=state, safe_serialization=True)
        return [ref.path for ref in put_folder(self.spec.store, folder, f"{self.spec.work}/{name}")]

    def _forget_worse(self) -> None:
        """Remove weights that were the best until the checkpoint just written."""
        if self.rank == 0 and self.stopping:
            kept = set(self.state.best.files) if self.state.best else set()
            for one in self.spec.store.files(f"{self.spec.work}/best"):
                if one.path not in kept:
                    self.spec.store.remove(one.path)

    def _finish(self, stopped: bool) -> None:
        import torch

        if not self.state.history:
            self._point(True)
        best = self.state.best
        files = best.files if best else tuple(self._save("trained"))
        counts = torch.tensor([self.own["real_tokens"], self.own["tokens"], self.own["rows"]], device=self.engine.device)
        torch.distributed.all_reduce(counts)
        if self.rank == 0:
            real_tokens, tokens, rows = (int(count) for count in counts.tolist())
            size = self._logit_bytes(self.config.logits) if self.config.logits is not None else None
            done = TrainedRun(
                history=tuple(self.state.history),
                files=files,
                steps=self.state.step,
                taken_step=best.step if best else self.state.step,
                stopped_early=stopped,
                real_tokens=real_tokens,
                tokens=tokens,
                rows=rows,
                trained_params=zero.count_trainable(self.engine.module),
                logits_bytes=size,
                logits_bytes_per_row=None if size is None else size / (len(self.trained["length"]) + len(self.held["length"])),
            )
            write_json(self.spec.store, self.spec.done, done.model_dump(mode="json"))

    def _logit_bytes(self, config: logits.Logits) -> int:
        """Bytes that the teacher's logits take in the store, compressed."""
        if config.teacher:
            return sum(self.spec.store.size(f"{self.spec.work}/logits-{i:05}-of-{self.world:05}.parquet") for i in range(self.world))
        return column_bytes(self.spec.store, self.spec.examples, logits.COLUMNS)


def learning_rate(step: int, steps: int, peak: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    warmup = max(1, int(steps * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def _model(spec: Spec, scratch: Path) -> Any:
    base = spec.config.base
    if spec.base_files:
        path = str(fetch_folder(spec.store, spec.base_files, scratch / "base"))
    else:
        path = check_weights(resolve_weights(base.model, base.revision, spec.store), spec.base_digest).path
    model, tokenizer = spec.learner.load(path, base.revision)
    return model if spec.config.lora is None else add_adapters(model, tokenizer, spec.learner, spec.config.lora)


def add_adapters(model: Any, tokenizer: Any, learner: Learner, lora: Lora) -> Any:
    """`model` with adapters to train, and with the embeddings of the compact format's symbols where it cannot tell them apart.

    Adapters leave embeddings as they are, and those of tokens that a base never saw are all equal.
    """
    from peft import LoraConfig, get_peft_model

    symbols = learner.io_format.symbols(tokenizer)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
            task_type=learner.adapter_task,
            trainable_token_indices=symbols if symbols and not tells_apart(model, symbols) else None,
        ),
    )


def tells_apart(model: Any, tokens: Sequence[int]) -> bool:
    """Whether no two of `tokens` have nearly the same embedding.

    Training some embeddings copies the table of all at each step: with Gemma's 262,144 tokens a step takes twice as long.
    """
    from torch.nn import functional

    known = functional.normalize(model.get_input_embeddings().weight.detach()[list(tokens)].float(), dim=1)
    return bool((known @ known.T).fill_diagonal_(0).max() < ALIKE)
