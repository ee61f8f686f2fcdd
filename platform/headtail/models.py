"""Where a model is and what its weights are called: the part of an answer's key that names the model.

In: the `model` field of a config. Out: a Found (local folder or hub id, digest, name). Shipped models (example:teacher),
local folders, students of the store (distill/<fp>) and hub ids with a revision; what cannot be pinned is refused.
Knows nothing of engines.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from headtail.errors import ConfigError
from headtail.keys import sha256_tree
from headtail.receipt import load_receipt
from headtail.storage import Storage, fetch_folder

SHIPPED = Path(__file__).parent / "examples" / "models"


@dataclass(frozen=True)
class Found:
    """A model that can be loaded: `path` is a local folder or a hub id, `digest` pins its weights, `name` is for people."""

    path: str
    digest: str
    name: str


def resolve(model: str, revision: str, store: Storage) -> Found:
    """Find a model. ConfigError says what to do when it is not there or cannot be pinned."""
    if model.startswith("example:"):
        folder = SHIPPED / model.removeprefix("example:")
        if not (folder / "config.json").is_file():
            raise ConfigError("no such shipped model", where="model", value=model, fix=f"one of: {', '.join('example:' + p.name for p in sorted(SHIPPED.glob('*')))}")
        return Found(str(folder), sha256_tree(folder), model)
    if model.startswith("distill/"):
        receipt = load_receipt(store, "distill", model)
        files = [ref.path for name, ref in receipt.outputs.items() if name.startswith("model/")]
        cache = Path(tempfile.gettempdir()) / "headtail-models" / receipt.fingerprint
        return Found(str(fetch_folder(store, files, cache)), str(receipt.facts["digest"]), model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError("not a Hugging Face model folder: no config.json", where="model", value=model)
        return Found(str(folder.resolve()), sha256_tree(folder), folder.name)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError("model not found", where="model", value=model, fix="give a folder with config.json, a hub id (org/name) with its revision, distill/<fingerprint> or example:teacher")
    if not revision:
        raise ConfigError("a hub model needs its revision, or its answers could come from other weights tomorrow", where="revision", value=model, fix="set revision to the commit hash shown on the hub")
    return Found(model, f"hub:{model}@{revision}", model)
