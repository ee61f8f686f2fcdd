"""What each training worker does: DeepSpeed steps over its share of the batches, checkpoints, and the finished weights.

In: a Spec (where tokens and base are, and the settings). Out: in the store, `work/trained` (adapter or full weights,
written by rank 0) and `work/history.json`. Runs inside Ray Train's worker group on GPUs (nccl) or CPUs (gloo). Knows
nothing of tasks or prompts: it sees token ids.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headtail.distill.batches import Batch, epoch
from headtail.errors import TrainingError
from headtail.storage import Storage, fetch_folder, put_folder, read_table, write_json


@dataclass(frozen=True)
class Spec:
    """All that a worker needs. Picklable; `settings` are the plain values of distill.Config."""

    store: Storage
    work: str  # folder in the store
    tokens: str  # table of batches.TOKENS
    base_files: tuple[str, ...]  # store paths of the base model, or empty when `base_path` is a hub id or shared folder
    base_path: str
    revision: str
    pad: int
    settings: dict[str, Any]
    meter: Any


def worker(spec: Spec) -> None:
    """One rank's whole run."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if spec.settings["gpus_per_worker"] else "cpu")
    import torch
    from ray import train

    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    if not spec.settings["gpus_per_worker"]:
        torch.set_num_threads(max(1, int(spec.settings["cpus_per_worker"])))
    torch.manual_seed(spec.settings["seed"])
    with tempfile.TemporaryDirectory(prefix="headtail-train-") as scratch:
        engine = _engine(_model(spec, Path(scratch)), spec.settings)
        trained, held = _rows(spec, held_out=False), _rows(spec, held_out=True)
        run = _Run(spec, engine, rank, world, trained, held)
        run.train()
        if rank == 0:
            _save(spec, engine.module, Path(scratch))
            write_json(spec.store, f"{spec.work}/history.json", run.history)
    torch.distributed.barrier()


class _Run:
    """The loop's state: where it is, what it saw."""

    def __init__(self, spec: Spec, engine: Any, rank: int, world: int, trained: _Rows, held: _Rows) -> None:
        self.spec, self.engine, self.rank, self.world, self.trained, self.held = spec, engine, rank, world, trained, held
        self.settings = spec.settings
        per_epoch = math.ceil(len(trained.ids) / (self.settings["batch_rows"] * world))
        self.steps = math.ceil(per_epoch * self.settings["epochs"])
        if self.settings["max_steps"]:
            self.steps = min(self.steps, self.settings["max_steps"])
        self.history: list[dict[str, float]] = []
        self.started = time.monotonic()

    def train(self) -> None:
        """All steps from the last complete checkpoint on."""
        import torch

        step = self._resume()
        first, losses = step, []
        per_epoch = math.ceil(len(self.trained.ids) / (self.settings["batch_rows"] * self.world))
        while step < self.steps:
            number = step // per_epoch
            for at, batch in enumerate(self._epoch(self.trained, seed=self.settings["seed"] + 1000 * number)):
                if at < step - number * per_epoch:
                    continue  # done before the checkpoint
                if step >= self.steps:
                    break
                losses.append(self._step(step, batch))
                step += 1
                if self.rank == 0:
                    self.spec.meter.add.remote(done=self.settings["batch_rows"] * self.world)
                if step % self.settings["log_steps"] == 0 or step == self.steps:
                    self._log(step, losses)
                    losses = []
                if step % self.settings["checkpoint_steps"] == 0 and step < self.steps:
                    self._checkpoint(step)
        if first == self.steps and not self.history:
            self._log(step, [])
        torch.distributed.barrier()

    def _epoch(self, rows: _Rows, seed: int) -> Any:
        return epoch(
            rows.ids,
            rows.starts,
            rows.weights,
            rows=self.settings["batch_rows"],
            workers=self.world,
            worker=self.rank,
            seed=seed,
            pad=self.spec.pad,
        )

    def _step(self, step: int, batch: Batch) -> float:
        rate = learning_rate(step, self.steps, self.settings["learning_rate"], self.settings["warmup_share"])
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total, weight = self._loss(batch)
        loss = total / weight.clamp(min=1e-6)
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def _loss(self, batch: Batch) -> tuple[Any, Any]:
        """(weighted sum of answer-token losses, sum of weights)."""
        import torch
        from torch.nn import functional

        device = self.engine.device
        ids, mask, labels = (torch.from_numpy(x).to(device) for x in (batch.ids, batch.mask, batch.labels))
        hidden = self.engine(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:]
        chosen = wanted != -100  # the loss is on answer tokens only: gather them before the fp32 softmax
        each = functional.cross_entropy(hidden[chosen].float(), wanted[chosen], reduction="none")
        weight = torch.from_numpy(batch.weight).to(device)[:, None].expand_as(wanted)[chosen]
        return (each * weight).sum(), weight.sum()

    def _log(self, step: int, losses: list[float]) -> None:
        point = {
            "step": float(step),
            "loss": float(np.mean(losses)) if losses else float("nan"),
            "eval_loss": self._evaluate(),
            "seconds": time.monotonic() - self.started,
        }
        if losses and not math.isfinite(point["loss"]):
            raise TrainingError("the loss is no longer a number", where=f"step {step}", fix="lower learning_rate")
        self.history.append(point)

    def _evaluate(self) -> float:
        """Mean loss per answer token on the held-out rows, over all ranks."""
        import torch

        if not self.held.ids:
            return float("nan")
        sums = torch.zeros(2)
        self.engine.eval()
        with torch.no_grad():
            for batch in self._epoch(self.held, seed=0):
                total, weight = self._loss(batch)
                sums += torch.stack([total, weight]).detach().float().cpu()
        self.engine.train()
        sums = sums.to(self.engine.device)
        torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1].clamp(min=1e-6))

    @property
    def _folder(self) -> str:
        """Where checkpoints are: the store's own disk. On S3 a run that fails starts over (see docs/distill)."""
        return "" if self.spec.store.root.startswith("s3://") else self.spec.store.full(f"{self.spec.work}/checkpoints")

    def _checkpoint(self, step: int) -> None:
        import torch

        if not self._folder:
            return
        self.engine.save_checkpoint(self._folder, tag=f"step-{step}", save_latest=False)
        torch.distributed.barrier()
        if self.rank == 0:  # the marker comes last: a checkpoint without it does not exist
            marker = {"step": step, "history": self.history}
            self.spec.store.replace(f"{self.spec.work}/checkpoints/COMPLETE", json.dumps(marker).encode())

    def _resume(self) -> int:
        marker = f"{self.spec.work}/checkpoints/COMPLETE"
        if not self._folder or not self.spec.store.exists(marker):
            return 0
        found = json.loads(self.spec.store.read(marker))
        self.engine.load_checkpoint(self._folder, tag=f"step-{found['step']}")
        self.history = found["history"]
        return int(found["step"])


def learning_rate(step: int, steps: int, peak: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    warmup = max(1, int(steps * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


@dataclass(frozen=True)
class _Rows:
    ids: list[np.ndarray]
    starts: np.ndarray
    weights: np.ndarray


def _rows(spec: Spec, held_out: bool) -> _Rows:
    table = read_table(spec.store, spec.tokens)
    table = table.filter(table["held_out"].to_numpy() == held_out)
    ids = [np.asarray(row, dtype=np.int64) for row in table["ids"].to_pylist()]
    return _Rows(ids, table["answer_start"].to_numpy(), table["weight"].to_numpy())


def _model(spec: Spec, scratch: Path) -> Any:
    from headtail.distill.base import load_base

    path = str(fetch_folder(spec.store, spec.base_files, scratch / "base")) if spec.base_files else spec.base_path
    model, _ = load_base(path, spec.revision)
    lora = spec.settings["lora"]
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=lora["targets"] if isinstance(lora["targets"], str) else list(lora["targets"]),
            task_type="CAUSAL_LM",
        ),
    )


def _engine(model: Any, settings: dict[str, Any]) -> Any:
    import logging

    import deepspeed
    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings["learning_rate"], betas=(0.9, 0.95), weight_decay=settings["weight_decay"])
    config = {
        "train_micro_batch_size_per_gpu": settings["batch_rows"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": settings["zero_stage"], "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trainable, config=config)
    return engine


def _save(spec: Spec, module: Any, scratch: Path) -> None:
    """Adapter (LoRA) or whole model, moved into the store as `work/trained`."""
    import torch

    folder = scratch / "trained"
    if spec.settings["lora"] is None:
        module.to(torch.bfloat16)
    module.save_pretrained(folder, safe_serialization=True)
    put_folder(spec.store, folder, f"{spec.work}/trained")
