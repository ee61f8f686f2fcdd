"""The settings of a client: where the server and the snapshot are, and how long a caller may wait."""

from __future__ import annotations

from pydantic import Field

from headtail.core.config import Config


class ClientConfig(Config):
    """Where answers come from, and what they may cost."""

    url: str = Field("http://127.0.0.1:8000", description="the server; empty: there is none, and misses get the fallback")
    api_key: str = Field("", description="API key of the server; empty: the variable HEADTAIL_API_KEY, else none", repr=False)
    ca_file: str = Field("", description="certificates to trust, as PEM, for a server with a private one; empty: the public ones")
    key_without_tls: bool = Field(False, description="send the API key over http:// to another machine, where others may read it")
    root: str = Field("", description="store with the release whose snapshot is read here; empty: every query goes to the server")
    cache_dir: str = Field("", description="local folder for copies of snapshots; needed when root is a network mount")
    refresh_s: float = Field(5.0, gt=0, description="seconds between checks for a new release")
    report_s: float = Field(
        0.0, ge=0, description="seconds between reports of how many hits were answered here, for the server's metrics; 0: none is sent"
    )
    timeout_ms: int = Field(2500, ge=1, description="milliseconds that a caller waits for the server, retries included")
    connect_timeout_ms: int = Field(250, ge=1, description="milliseconds to open a connection")
    retries: int = Field(2, ge=0, description="further tries of a request that failed; asking again is harmless")
    backoff_ms: float = Field(25.0, ge=0, description="milliseconds before the first retry at most; twice as many before each later one")
    connections: int = Field(100, ge=1, description="open connections to the server at most")
    breaker_failures: int = Field(5, ge=1, description="failures in a row after which the server is left alone")
    breaker_pause_s: float = Field(1.0, gt=0, description="seconds that it is left alone at first; doubled up to 30")
    fallback: bool = Field(True, description="give the task's fallback, marked degraded, when the server gives no answer; needs root")
    max_query_chars: int = Field(200, ge=1, le=10_000, description="characters of a normalised query, as in the server's config")
