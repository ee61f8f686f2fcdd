"""Prices of a plan: figures that were set, or those of precompute receipts.

In: the config's prices, a store, a task's name. Out: Costs per answer. A price that is neither set nor in a receipt is None. A source's
price comes from its own answers alone: `latest` is its latest run for this task, whatever else ran since.
"""

from __future__ import annotations

from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.batch.catalog import finished_jobs
from headtail.core.errors import InputError
from headtail.core.receipt import LATEST
from headtail.stages.plan.config import Price, Prices
from headtail.stages.plan.money import Costs
from headtail.stages.precompute.result import Result as PrecomputeResult


def resolve_costs(store: Storage, prices: Prices, task: str) -> Costs:
    """USD per answer. InputError when a receipt that is named has no price, or is of another answer source."""
    return Costs(
        _usd(store, "teacher", prices.teacher, task),
        _usd(store, "batch_student", prices.batch_student, task),
        _usd(store, "realtime_student", prices.realtime_student, task),
        prices.hit_value_usd_per_million / 1e6,
    )


def _usd(store: Storage, name: str, price: Price, task: str) -> float | None:
    if price.usd_per_million is not None:
        return price.usd_per_million / 1e6
    if not price.receipt:
        return None
    ref = _latest_run(store, name, task) if price.receipt in (LATEST, "precompute") else price.receipt
    receipt = load_receipt(store, "precompute", ref, PrecomputeResult)
    if receipt.result.source != name:
        raise InputError(
            f"this receipt is of another answer source than {name}",
            where=f"prices.{name}.receipt",
            value=f"{receipt.path}: source {receipt.result.source}, model {receipt.result.model.name}",
            fix=f"name a run of {name}, `latest` for the last one, or set prices.{name}.usd_per_million",
        )
    figures = receipt.result.figures
    if figures is None or figures.usd_per_million is None:
        raise InputError(
            "this receipt has no price: its model had none" if figures else "an earlier version wrote this receipt: it has no price",
            where=f"prices.{name}.receipt",
            value=receipt.path,
            fix=f"set prices.{name}.usd_per_million",
        )
    work, start = figures.generate_s, figures.engine_start_s
    return figures.usd_per_million / 1e6 * (work / (work + start) if work else 1.0)


def _latest_run(store: Storage, name: str, task: str) -> str:
    if last := next((entry for entry in finished_jobs(store, task) if entry.source == name), None):
        return last.path
    raise InputError(
        f"no finished precompute of this store is of {name} for this task",
        where=f"prices.{name}.receipt",
        value=f"{LATEST}, task {task}",
        fix=f"set prices.{name}.usd_per_million, or run precompute with source={name} first",
    )
