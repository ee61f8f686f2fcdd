"""A model is found and pinned, or refused with what to do."""

from __future__ import annotations

import ast
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from headtail.adapters.storage import Storage, open_storage, put, write_json
from headtail.batch.prepare import prepare_input
from headtail.batch.worker import Worker
from headtail.core.errors import ConfigError, InputError, StorageError
from headtail.core.receipt import Receipt
from headtail.engines import ModelConfig
from headtail.engines.models import SHIPPED, find_model, private_folder, resolve_weights, weights_digest
from headtail.engines.vllm import engine_arguments
from null_jobs import MakeJob, planned


@pytest.fixture(autouse=True)
def _own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of models that a test fetches are its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "small-model"
    made.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "merges.txt", "README.md"):
        (made / name).write_text(name)
    return made


def published(store: Storage, folder: Path) -> Receipt:
    """A distill receipt whose outputs are the files of `folder`."""
    outputs = {}
    for file in sorted(folder.iterdir()):
        copy = folder.parent / file.name
        shutil.copy(file, copy)
        outputs[f"model/{file.name}"] = put(store, copy, f"distill/abc/model/{file.name}")
    receipt = Receipt(stage="distill", fingerprint="abc" * 10, path="distill/abc", started="", seconds=0, outputs=outputs)
    write_json(store, "distill/abc/receipt.json", receipt.model_dump(mode="json"))
    return receipt


def test_the_shipped_teacher(store: Storage, teacher_path: Path) -> None:
    found = resolve_weights("example:teacher", "", store)
    assert (found.path, found.name) == (str(teacher_path), "example:teacher")
    assert len(found.digest) == 64


def test_a_folder_is_pinned_by_what_changes_answers(store: Storage, folder: Path) -> None:
    before = resolve_weights(str(folder), "", store)
    assert (before.path, before.name) == (str(folder), "small-model")
    (folder / "README.md").write_text("another word")
    (folder / ".cache").write_text("x")
    assert resolve_weights(str(folder), "", store).digest == before.digest
    for name in ("config.json", "model.safetensors", "tokenizer.json", "merges.txt"):
        (folder / name).write_text("changed")
        after = resolve_weights(str(folder), "", store).digest
        assert after != before.digest
        (folder / name).write_text(name)


@pytest.mark.parametrize("where", ["store", "s3"])
def test_a_student_is_fetched_and_checked(where: str, request: pytest.FixtureRequest, folder: Path) -> None:
    store = open_storage(request.getfixturevalue("root" if where == "store" else "s3_root"))
    receipt = published(store, folder)
    found = resolve_weights("distill/abc", "", store)
    assert found.digest == weights_digest(folder)
    assert {file.name for file in Path(found.path).iterdir()} == {file.name for file in folder.iterdir()}
    assert resolve_weights("distill/abc", "", store, fetch=False).path == "distill/abc"
    store.replace(receipt.outputs["model/config.json"].path, b"something else")
    cached = Path(found.path) / "config.json"
    cached.unlink(missing_ok=where == "s3") if where == "s3" else None
    with pytest.raises(StorageError, match="not the one that was published"):
        resolve_weights("distill/abc", "", store)


@pytest.mark.parametrize("where", ["store", "s3"])
def test_a_students_folder_holds_no_other_file(where: str, request: pytest.FixtureRequest, folder: Path) -> None:
    """A file that lies beside those that were published could be loaded by an engine in their place."""
    store = open_storage(request.getfixturevalue("root" if where == "store" else "s3_root"))
    published(store, folder)
    found = Path(resolve_weights("distill/abc", "", store).path)
    (found / "pytorch_model.bin").write_bytes(b"planted")
    with pytest.raises(StorageError, match="holds other files too"):
        resolve_weights("distill/abc", "", store)


def test_copies_of_models_lie_where_nobody_else_can_write(tmp_path: Path) -> None:
    made = private_folder()
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_folder() == made
    made.chmod(0o755)
    with pytest.raises(StorageError, match="not this user's alone"):
        private_folder()
    made.rmdir()
    made.symlink_to(tmp_path)
    with pytest.raises(StorageError, match="not this user's alone"):
        private_folder()


def test_a_node_with_other_weights_answers_nothing(make_local_job: MakeJob, folder: Path) -> None:
    """The driver's digest is in every key: a worker that finds other weights under the same path stops before its engine starts."""
    job = make_local_job(planned(["pizza"]), model=ModelConfig(model=str(folder)), digest=weights_digest(folder))
    (folder / "model.safetensors").write_text("other weights")
    worker = Worker(job, prepare_input(job), "run")
    with pytest.raises(ConfigError, match="a node has other weights than the job") as error:
        worker.ensure_engine()
    assert socket.gethostname() in error.value.where
    assert str(folder) in error.value.where
    assert job.digest in str(error.value)
    assert weights_digest(folder) in str(error.value)


def test_a_training_worker_with_another_base_makes_no_step(store: Storage, folder: Path, tmp_path: Path) -> None:
    from headtail.stages import distill
    from headtail.stages.distill.base import BaseModelConfig
    from headtail.stages.distill.learner import DecoderLearner
    from headtail.stages.distill.train import Spec, _model

    config = distill.Config(base=BaseModelConfig(model=str(folder)))
    spec = Spec(store, "run", DecoderLearner(), (), 0, config, None, base_digest=weights_digest(folder))
    (folder / "model.safetensors").write_text("other weights")
    with pytest.raises(ConfigError, match="a node has other weights than the job"):
        _model(spec, tmp_path)


def test_no_model_brings_its_own_code() -> None:
    """Every call that loads a model or a tokenizer says trust_remote_code=False; PEFT's adapters hold no code."""
    seen = 0
    for file in sorted(SHIPPED.parent.parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "PeftModel":
                continue
            said = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            assert said.get("trust_remote_code") is False, f"{file}:{node.lineno}"
            seen += 1
    assert seen >= 3
    assert engine_arguments(ModelConfig(max_num_seqs=1, max_num_batched_tokens=1), "x")["trust_remote_code"] is False, (
        "vLLM's engines take these"
    )


@pytest.mark.parametrize(
    "model, revision, says",
    [
        ("example:nothing", "", "no such shipped model"),
        ("/no/such/folder", "", "model not found"),
        ("./nothing", "", "model not found"),
        ("nothing", "", "model not found"),
        ("a/b/c", "", "model not found"),
        ("org/model", "", "needs its revision as a commit"),
        ("org/model", "main", "needs its revision as a commit"),
        ("org/model", "v1.0", "needs its revision as a commit"),
        ("org/model", "a" * 39, "needs its revision as a commit"),
        ("org/model", "A" * 40, "needs its revision as a commit"),
    ],
)
def test_what_cannot_be_pinned_is_refused(store: Storage, model: str, revision: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        resolve_weights(model, revision, store)
    assert error.value.fix


def test_a_folder_without_config_is_refused(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_weights(str(tmp_path), "", store)


def test_a_student_that_was_never_made(store: Storage) -> None:
    with pytest.raises(InputError, match="no finished distill"):
        resolve_weights("distill/ffff", "", store)


def test_hub_ids_carry_their_revision(store: Storage) -> None:
    one, two = (resolve_weights("org/model", revision * 40, store) for revision in "ab")
    assert one.path == two.path == "org/model"
    assert one.digest != two.digest


def test_an_endpoint_is_part_of_the_digest(store: Storage) -> None:
    def digest(**fields: str) -> str:
        plain = {"engine": "openai", "base_url": "http://a/v1", "model": "m"}
        return find_model(ModelConfig.model_validate({**plain, **fields}), store).digest

    assert len({digest(), digest(base_url="http://b/v1"), digest(model="n"), digest(revision="2")}) == 4
    assert digest() == digest(base_url="http://a/v1/")


@pytest.mark.parametrize("url", ["", "host/v1", "ftp://host/v1", "https://me:secret@host/v1", "https://host/v1?key=secret"])
def test_a_base_url_that_cannot_be_written_down_is_refused(store: Storage, url: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_model(ModelConfig(engine="openai", model="m", base_url=url), store)
    assert "secret" not in str(error.value)
