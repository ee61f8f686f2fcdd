"""The API key on its way to a server."""

from __future__ import annotations

import pytest

from headtail.adapters.server_key import VARIABLE, key_headers
from headtail.core.errors import ConfigError

FAR = "http://search.internal:8000"


def test_the_key_goes_over_tls_or_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert key_headers(FAR) == {}
    for url in ("https://search.internal", "http://127.0.0.1:8000", "http://localhost:1"):
        assert key_headers(url, "htk_a") == {"authorization": "Bearer htk_a"}
    assert key_headers(FAR, "htk_a", without_tls=True) == {"authorization": "Bearer htk_a"}
    monkeypatch.setenv(VARIABLE, "htk_of_the_environment")
    assert key_headers("http://127.0.0.1:8000") == {"authorization": "Bearer htk_of_the_environment"}
    for key in ("", "htk_a"):
        with pytest.raises(ConfigError, match="without encryption") as refused:
            key_headers(FAR, key)
        assert "htk_" not in str(refused.value)
