"""The API key of a headtail server, on its way there: from the environment, and never in clear text to another machine.

In: a URL. Out: the header for it. Knows nothing of who sends it.
"""

from __future__ import annotations

import os

from headtail.adapters.proxies import may_proxy
from headtail.core.errors import ConfigError

VARIABLE = "HEADTAIL_API_KEY"


def key_headers(url: str, key: str = "", without_tls: bool = False) -> dict[str, str]:
    """The Authorization header for a server at `url`; none without a key. `key` empty: the variable HEADTAIL_API_KEY.

    ConfigError when the key would cross the network without encryption, unless `without_tls`.
    """
    held = key or os.environ.get(VARIABLE, "")
    if not held.isascii() or not held.isprintable() or " " in held:
        fix = f"copy the key again; a file's newline at its end is a common cause ({VARIABLE})"
        raise ConfigError("the API key has a character that no key has", where="api_key", fix=fix)
    if held and not without_tls and not url.startswith("https://") and may_proxy(url):
        fix = f"use https://, or unset {VARIABLE}; a client may set key_without_tls in a network that you trust"
        raise ConfigError("the API key would cross the network without encryption", where="url", value=url, fix=fix)
    return {"authorization": f"Bearer {held}"} if held else {}
