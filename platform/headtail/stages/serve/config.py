"""The settings of a server: what is served, where, and what it may cost a caller.

In: YAML and `--set`. Out: a frozen Config, which front processes and students get whole. Knows nothing of how it is served.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from headtail.core.config import StageConfig, execution
from headtail.engines import ModelConfig


class RealtimeModel(ModelConfig):
    """The engine of the realtime student. `model` empty: the release's own student."""

    model: str = Field("", description="empty: the student that the release names; else this model instead, such as example:teacher")


class Config(StageConfig):
    """What is served, where, and what it may cost a caller."""

    host: str = execution(
        "127.0.0.1", "address to listen on; 0.0.0.0 for every interface. There is no authentication: put a gateway before it"
    )
    port: int = execution(8000, "TCP port", ge=1, le=65535)
    release: str = Field("current", description="`current` follows promotions and rollbacks; a release id serves that release only")
    model: RealtimeModel = Field(RealtimeModel(), description="engine of the realtime student")
    realtime_student: bool = Field(True, description="start the realtime student; off: misses get the fallback")
    realtime_timeout_ms: int = Field(
        2000, ge=1, le=600_000, description="milliseconds a miss waits for the student before it gets the fallback"
    )
    max_ongoing_requests: int = execution(64, "concurrent requests per replica", ge=2)
    max_queued_requests: int = execution(256, "requests that may wait; further ones are refused (ingress: 503, student: fallback)", ge=1)
    ingress_replicas: int = execution(1, "processes that receive requests", ge=1)
    realtime_replicas: int = execution(1, "student engines", ge=1)
    max_query_chars: int = Field(200, ge=1, le=10_000, description="characters of a normalised query; longer ones are refused with 422")
    refresh_s: float = execution(5.0, "seconds between checks of CURRENT", gt=0)
    cache_dir: str = execution("", "local folder for copies of snapshots; needed when root is a network mount, else chosen when root is S3")
    start_timeout_s: float = execution(300.0, "maximum seconds for the start", gt=0)

    @property
    def max_realtime(self) -> int:
        """Requests of one replica that may wait for the student at once: the other places are for cache hits."""
        return max(1, self.max_ongoing_requests * 3 // 4)

    @property
    def copies(self) -> Path | None:
        """Where snapshots are copied to, or None to let the store decide."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else None
