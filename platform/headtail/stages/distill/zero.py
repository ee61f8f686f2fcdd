"""A small interface to DeepSpeed: an engine from a model and settings, and its complete weights.

In: a Hugging Face model and a distill.Config. Out: a DeepSpeed engine (ZeRO 0-3, bf16 or fp32), and from
it a state dict that holds every weight, also where ZeRO-3 has split them. Knows nothing of batches or stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headtail.stages.distill.stage import Config

CLIP = 1.0  # gradient norm above which a step is shortened


def start_engine(model: Any, how: Config) -> Any:
    """A DeepSpeed engine for the weights of `model` that train, with AdamW."""
    import logging

    import deepspeed
    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not how.gpus_per_worker:
        # DeepSpeed would probe every op and build one with g++ (deepspeed_shm_comm), 20 to 60 s at first use. Only its inference calls that
        # one; training's sums go through gloo with it or without. DeepSpeed keeps this table as a module attribute that callers may edit.
        deepspeed.ops.__compatible_ops__ = {}
    trainable = [p for p in model.parameters() if p.requires_grad]
    # fused: one pass over the weights, 8 ms instead of 64 for 3 million on a core, and nothing to build as DeepSpeed's own would need
    fixed: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": how.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(trainable, lr=how.learning_rate, **fixed)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": how.batch_rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": how.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": how.precision == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trainable, config=config)
    return engine


def count_trainable(module: Any) -> int:
    """Parameters that train, over all ranks: under ZeRO-3 a rank holds a part and `ds_numel` has the whole."""
    return sum(int(getattr(one, "ds_numel", one.numel())) for one in module.parameters() if one.requires_grad)


def gather_weights(module: Any, zero_stage: int, trained_only: bool, keep: bool) -> dict[str, Any] | None:
    """Every weight of `module` on the CPU, by name; None unless `keep`. All ranks call it: under ZeRO-3 each holds a part.

    `trained_only` leaves out weights that do not train (the base under an adapter). save_16bit_model can write nothing and
    return False under ZeRO-3, hence this.
    """
    if zero_stage < 3:
        if not keep:
            return None
        trains = {name for name, p in module.named_parameters() if p.requires_grad}
        return {name: value.detach().cpu() for name, value in module.state_dict().items() if name in trains or not trained_only}
    import deepspeed

    weights: dict[str, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if trained_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):  # one at a time: the whole model need not fit one GPU
            if keep:
                weights[name] = parameter.detach().cpu().clone()
    if keep and not trained_only:
        weights |= {name: value.detach().cpu() for name, value in module.state_dict().items() if name not in weights and value.numel()}
    return weights if keep else None
