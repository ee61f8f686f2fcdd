"""Whatever a task's own code raises is a ConfigError, but what the user raises."""

from __future__ import annotations

import pytest

from headtail.core.errors import ConfigError
from headtail.core.own_code import own_code


@pytest.mark.parametrize("error", [SystemExit(0), ImportError("no module"), ValueError("x"), GeneratorExit()])
def test_it_becomes_a_config_error(error: BaseException) -> None:
    with (
        pytest.raises(ConfigError, match=f"field answer: {type(error).__name__}: ") as found,
        own_code("m:f", "t", "mend it", "answer"),
    ):
        raise error
    assert (found.value.where, found.value.value, found.value.fix) == ("t", "m:f", "mend it")
    assert found.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("its own", where="here", fix="this")])
def test_it_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, own_code("m:f", "t", "mend it"):
        raise error
    assert found.value is error
