"""What a store holds, from its pointers."""

from __future__ import annotations

from pathlib import Path

import pytest

from headtail.cli.status import status, status_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError
from headtail.examples import example_data


def test_latest_stage_and_no_release_yet(root: str) -> None:
    receipt = example_data.run(example_data.Config(root=root, tracking=TrackingConfig(enabled=False), events=100, labels=5))
    found = status(root)
    assert found["release"] is None
    assert found["stages"]["example-data"]["path"] == receipt.path
    assert "no release yet" in str(status_table(found).title)


@pytest.mark.parametrize("name, said", [("nosuch", "no store here"), ("file", "a file, not a directory"), ("", "root is empty")])
def test_a_store_that_is_not_there_is_an_error(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=said) as error:
        status(str(tmp_path / name) if name else "")
    assert error.value.fix
