"""Checkpoints from which a killed run continues exactly, on local disk and on S3.

    <work>/checkpoints/step-00000120/...   DeepSpeed's files, each rank's own, and each rank's random state
    <work>/checkpoints/COMPLETE            which of them is complete, with the digest of every file, and where the loop was

In: a DeepSpeed engine and the loop's state. Out: the same again in a new process. Every rank writes to its own disk and
moves its files into the store; the marker is replaced last, so a checkpoint without it does not exist, and only then are
older ones removed. Knows nothing of what is learnt.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from headtail.adapters.storage import Storage, put_folder, read_record
from headtail.core.config import Config
from headtail.core.errors import StorageError
from headtail.core.keys import sha256_file
from headtail.core.paths import StoreId
from headtail.stages.distill.run_record import LoopRecord, TrainingMakeup

_TAG = re.compile("step-[0-9]{8}")
_OWN = "rank-{rank:05}.pt"


class Marker(Config):
    """A checkpoint that is whole."""

    tag: StoreId = Field(description="its folder's name")
    world: int = Field(1, ge=1, description="workers that wrote it")
    files: dict[str, StoreId] = Field(description="SHA-256 by path")
    state: LoopRecord = Field(description="where the loop was")
    made: TrainingMakeup | None = Field(None, description="what it was made of; null: not said, so it is not continued")
    steps: int = Field(0, ge=0, description="steps of the whole run; 0: not known")


class Checkpoints:
    """The checkpoints of one run, as one rank sees them."""

    def __init__(
        self, store: Storage, work: str, scratch: Path, rank: int, world: int, frozen: bool, made: TrainingMakeup | None = None
    ) -> None:
        self.store, self.folder, self.scratch, self.rank, self.world = store, f"{work}/checkpoints", scratch / "checkpoints", rank, world
        self.made = made  # what a checkpoint must have been made of to be continued
        self.frozen = frozen  # part of the weights does not train (the base under an adapter): it is not written again

    @property
    def _marker(self) -> str:
        return f"{self.folder}/COMPLETE"

    def save(self, engine: Any, step: int, state: LoopRecord, own: dict[str, Any], steps: int = 0) -> None:
        """Write one; all ranks call it. `state` is the loop's, the same on all; `own` this rank's; `steps`: of the whole run."""
        import torch

        tag = f"step-{step:08}"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        engine.save_checkpoint(str(self.scratch), tag=tag, save_latest=False, exclude_frozen_parameters=self.frozen)
        here = self.scratch / tag
        here.mkdir(exist_ok=True)
        for script in here.parent.rglob("*.py"):  # DeepSpeed leaves its recovery scripts beside every checkpoint
            script.unlink()
        torch.save({**own, "random": random_state()}, here / _OWN.format(rank=self.rank))
        refs = put_folder(self.store, here, f"{self.folder}/{tag}")
        lists: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(lists, {ref.path: ref.sha256 for ref in refs})
        if self.rank == 0:
            files = {path: digest for found in lists for path, digest in found.items()}
            marker = Marker(tag=tag, world=self.world, files=files, state=state, made=self.made, steps=steps)
            self.store.replace(self._marker, json.dumps(marker.model_dump(mode="json")).encode())
            self._remove_older(set(files))
        torch.distributed.barrier()

    def load(self, engine: Any) -> tuple[LoopRecord, dict[str, Any]] | None:
        """(the loop's state, this rank's own) of the complete checkpoint, put into `engine`; None when there is none.

        None as well when it is of another number of workers, ZeRO stage, precision, adapter or data: the run begins anew. Digests are
        compared before a file is read, and nothing but tensors and plain values is read from it: a store's file runs no code here.
        """
        if not self.store.exists(self._marker):
            return None
        marker = read_record(self.store, Marker, self._marker)
        if marker.made != self.made:
            return None
        shutil.rmtree(self.scratch, ignore_errors=True)
        mine = [path for path in marker.files if self.needs(Path(path).name)]
        folder = self.scratch
        for path in mine:
            if path.rpartition("/")[0] != f"{self.folder}/{marker.tag}" or not _TAG.fullmatch(marker.tag):
                raise StorageError("a checkpoint names a file outside its folder", where=self.store.uri(self._marker), value=path, fix=_FIX)
            local = self.store.fetch(path, self.scratch)
            if sha256_file(local) != marker.files[path]:
                raise StorageError("a checkpoint's file is not the one that was written", where=self.store.uri(path), fix=_FIX)
            folder = local.parent.parent
        engine.checkpoint_engine.load = tensors
        engine.load_checkpoint(str(folder), tag=marker.tag, load_module_strict=not self.frozen)
        own = tensors(str(folder / marker.tag / _OWN.format(rank=self.rank)))
        set_random_state(own.pop("random"))
        return marker.state, own

    def remove(self) -> None:
        """Take all of them away: the run has ended and its weights are kept elsewhere."""
        for one in self.store.files(self.folder):
            self.store.remove(one.path)

    def needs(self, name: str) -> bool:
        """Whether this rank reads a file: its own parts, and what all share."""
        if name.startswith("rank-"):
            return name == _OWN.format(rank=self.rank)
        return "zero_pp_rank_" not in name or f"zero_pp_rank_{self.rank}_" in name

    def _remove_older(self, files: set[str]) -> None:
        for one in self.store.files(self.folder):
            if one.path not in files and one.path != self._marker:
                self.store.remove(one.path)


_FIX = "it is damaged: remove the folder `checkpoints` beside it and run again; training then starts over"


def tensors(path: str, map_location: Any = None) -> Any:
    """What DeepSpeed's own `torch.load(weights_only=False)` would read: tensors, plain values and three of its classes.

    StorageError when there is anything else: unpickling it could run code.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        what = f"a checkpoint holds more than tensors and plain values: {str(error).splitlines()[0]}"
        raise StorageError(what, where=path, fix=_FIX) from None


def random_state() -> dict[str, Any]:
    """The state of every generator that a step draws from (dropout)."""
    import torch

    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing from where `random_state` was taken."""
    import torch

    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
