"""Where a model is, and the digest of its weights: the part of an answer's key that names the model.

In: the `model` field of a config. Out: a ResolvedModel (local folder or hub id, digest, name, I/O format). Shipped models
(example:teacher), local folders, students of the store (distill/<fp>), hub ids with a revision, models behind an endpoint. A model
that cannot be pinned is refused. Knows nothing of how an engine runs.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from headtail.adapters.storage import Storage, read_bytes
from headtail.adapters.storage.receipts import load_receipt
from headtail.core.errors import ConfigError, StorageError
from headtail.core.io_format import DEFAULT, FILE, ModelFormat, parse_format
from headtail.core.io_format import read_format as read_io_format
from headtail.core.keys import fingerprint, sha256_file, sha256_tree
from headtail.core.receipt import FileRef, Receipt
from headtail.engines.base import ModelConfig

SHIPPED = Path(__file__).parent.parent / "examples" / "models"
_BESIDE = (".md", ".txt", ".log", ".png", ".svg")  # about a model, not of it: their change changes no answer
_COMMIT = re.compile("[0-9a-f]{40}")
_TEXT_OF_MODEL = ("merges.txt", "vocab.txt")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that can be loaded: `path` is a local folder or a hub id, `digest` pins its weights, `name` is for people.

    `io_format`: how it is asked and answers, from the headtail.json beside its weights. A hub id or an endpoint has the default one.
    """

    path: str
    digest: str
    name: str
    io_format: ModelFormat = DEFAULT


def find_model(config: ModelConfig, store: Storage, fetch: bool = True) -> ResolvedModel:
    """The model of `config` for its engine. Without `fetch` a student stays in the store and `path` is its reference."""
    if config.traits.in_process:
        return resolve_weights(config.model, config.revision, store, fetch)
    if config.traits.endpoint:
        from headtail.engines.openai import check_url

        check_url(config.base_url)
        return ResolvedModel(config.model, f"endpoint:{config.base_url.rstrip('/')}:{config.model}@{config.revision}", config.model)
    return ResolvedModel(config.model, config.engine, config.engine)  # there are no weights: the engine is all that there is


def resolve_weights(model: str, revision: str, store: Storage, fetch: bool = True) -> ResolvedModel:
    """Find a model's weights. ConfigError says what to do when they are missing or cannot be pinned."""
    if model.startswith("example:"):
        folder = SHIPPED / model.removeprefix("example:")
        if not (folder / "config.json").is_file():
            shipped = ", ".join("example:" + p.name for p in sorted(SHIPPED.glob("*")) if (p / "config.json").is_file())
            raise ConfigError("no such shipped model", where="model", value=model, fix=f"one of: {shipped or 'none is shipped here'}")
        return ResolvedModel(str(folder), weights_digest(folder), model, read_io_format(folder))
    if model.startswith("distill/"):
        receipt = load_receipt(store, "distill", model)
        kept = receipt.outputs.get(f"model/{FILE}")
        fmt = parse_format(read_bytes(store, kept), store.uri(kept.path)) if kept else DEFAULT
        return ResolvedModel(str(_fetch_student(receipt, store)) if fetch else model, student_digest(receipt), model, fmt)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            fix = "give the folder that holds config.json, *.safetensors and tokenizer.json"
            raise ConfigError("not a Hugging Face model folder: no config.json", where="model", value=model, fix=fix)
        return ResolvedModel(str(folder.resolve()), weights_digest(folder), folder.resolve().name, read_io_format(folder))
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        fix = "give a folder with config.json, a hub id (org/name) with its revision, distill/<fingerprint> or example:teacher"
        raise ConfigError("model not found", where="model", value=model, fix=fix)
    if not _COMMIT.fullmatch(revision):
        fix = "set revision to the commit hash shown on the hub, 40 hex digits; if a local folder was meant, it does not exist"
        what = "a hub model needs its revision as a commit: a branch or tag could be other weights tomorrow"
        raise ConfigError(what, where="revision", value=f"{model} at {revision or 'none'}", fix=fix)
    return ResolvedModel(model, f"hub:{model}@{revision}", model)


def check_weights(model: ResolvedModel, digest: str) -> ResolvedModel:
    """`model` in a worker, when it is what the driver of the job saw; ConfigError when this node holds other weights under that name."""
    if model.digest != digest:
        fix = "give every node the same files, or name what all nodes fetch alike: a hub id with its commit, or distill/<fingerprint>"
        where = f"{model.path} on the node {socket.gethostname()}"
        raise ConfigError("a node has other weights than the job", where=where, value=f"{model.digest} there, {digest} in the job", fix=fix)
    return model


def weights_digest(folder: Path) -> str:
    """Hex SHA-256 over the files of a model folder that can change an answer: weights, configs, tokenizer, template."""
    return sha256_tree({name: sha256_file(folder / name) for name in _weight_files(folder)})


def student_digest(receipt: Receipt) -> str:
    """`weights_digest` of the model that a distill receipt names."""
    return sha256_tree({name: ref.sha256 for name, ref in _files(receipt).items() if _counts(Path(name))})


def _files(receipt: Receipt) -> dict[str, FileRef]:
    return {name.removeprefix("model/"): ref for name, ref in receipt.outputs.items() if name.startswith("model/")}


def _weight_files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and _counts(path.relative_to(folder))]


def _counts(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and (path.suffix not in _BESIDE or path.name in _TEXT_OF_MODEL) and path.name not in ("LICENSE", "NOTICE")


def _fetch_student(receipt: Receipt, store: Storage) -> Path:
    """A local folder with the student's files and no other, each checked against the digest in its receipt."""
    cache = private_folder() / fingerprint(store.root)[:16] / receipt.fingerprint  # two stores may hold runs of one fingerprint
    files = _files(receipt)
    if not files:
        raise ConfigError("this distill receipt holds no model files", where="model", value=receipt.path, fix="run distill again")
    for name, ref in files.items():
        local = cache / ref.path
        if not (local.is_file() and sha256_file(local) == ref.sha256):
            local = store.fetch(ref.path, cache)
            if sha256_file(local) != ref.sha256:
                fix = "it is damaged: run distill again after removing its folder"
                raise StorageError("a model file is not the one that was published", where=store.uri(ref.path), fix=fix)
        folder = local.parents[name.count("/")]
    if set(_weight_files(folder)) - files.keys():
        fix = "remove files that distill did not write; or run distill again after removing the folder"
        raise StorageError("a student's folder is not what was published: it holds other files too", where=str(folder), fix=fix)
    return folder


def private_folder() -> Path:
    """The folder for copies of models, which only this user can open. StorageError when another user made it first."""
    folder = Path(tempfile.gettempdir()) / f"headtail-models-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        fix = "remove it, or set TMPDIR to a folder of your own"
        raise StorageError("the folder for copies of models is not this user's alone", where=str(folder), fix=fix)
    return folder
