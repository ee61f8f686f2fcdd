"""The receipt: what each stage leaves behind, and the links from an answer back to the log.

In: what a stage counted and wrote. Out: a Receipt, stored as `<stage>/<fingerprint>/receipt.json`, written last: its
presence is what makes a stage's output exist. Knows nothing of how a stage works.
"""

from __future__ import annotations

from typing import Any, Generic, Self

from pydantic import ConfigDict, Field, NonNegativeInt, SerializeAsAny, model_validator
from typing_extensions import TypeVar

from headtail.core.config import Config
from headtail.core.errors import InputError
from headtail.core.keys import NORMALISATION
from headtail.core.paths import StoreId, StoreIdOrEmpty, StorePath
from headtail.core.secrets import hide_in

LATEST = "latest"
FORMAT = 3  # layout of receipts and of the tables that they name: raise it when those of an older version can no longer be read


class FileRef(Config):
    """A file that was written: where, how much, and the digest that proves it."""

    path: StorePath = Field(description="relative to the store's root")
    bytes: int = Field(ge=0, description="size")
    sha256: str = Field(description="hex digest of the bytes")
    rows: int | None = Field(None, description="rows, for tables")


class StageResult(Config):
    """What a stage found that others read by name. Each stage has its own kind; read as this one, a result has no fields."""

    model_config = ConfigDict(extra="ignore")


R_co = TypeVar("R_co", bound=StageResult, default=StageResult, covariant=True)


class Receipt(Config, Generic[R_co]):
    """One finished run of one stage."""

    format: int = Field(FORMAT, description="layout of this record")
    stage: StoreId = Field(description="name of the stage")
    fingerprint: StoreId = Field(description="hash over everything that decides the result")
    path: StorePath = Field(description="folder of the outputs, relative to the store's root")
    started: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(ge=0, description="wall-clock seconds the stage took")
    rows: dict[str, NonNegativeInt] = Field({}, description="rows by state or kind")
    metrics: dict[str, float] = Field({}, description="figures by plain name")
    inputs: dict[str, str] = Field({}, description="receipt path or file digest of each input, by name")
    outputs: dict[str, FileRef] = Field({}, description="files written, by name")
    settings: dict[str, Any] = Field({}, description="what the fingerprint was made over; for people: no stage reads it")
    task: str = Field("", description="name of the task; empty for a stage of none, or of several")
    task_fingerprint: str = Field("", description="the task's prompt, schema and sampling, where they decide the outputs; else empty")
    normalisation: int = Field(NORMALISATION, description="version of the normal form of queries")
    result: SerializeAsAny[R_co] = Field(StageResult(), description="what the stage found, in its own kind")  # type: ignore[assignment]
    versions: dict[str, str] = Field({}, description="packages that did the work")
    notes: tuple[str, ...] = Field((), description="what a reader should know before trusting the figures")
    run_id: StoreIdOrEmpty = Field("", description="MLflow run, empty when tracking was off or out of reach")
    reused: bool = Field(False, description="true when this call found the work already done")

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(result := data.get("result"), StageResult):
            data = {**data, "result": type(result).model_validate(hide_in(result.model_dump()))}
        return hide_in(data)

    @model_validator(mode="after")
    def _own_files_only(self) -> Self:
        """A stage writes into its own folder; `publish` also into snapshots/ and releases/."""
        if self.path.rpartition("/")[0] != self.stage:
            raise ValueError(f"path: the folder of a run of {self.stage} is {self.stage}/<fingerprint>, not {self.path}")
        for name, ref in self.outputs.items():
            if not ref.path.startswith((f"{self.path}/", "snapshots/", "releases/")):
                raise ValueError(f"outputs.{name}: {ref.path} is not below {self.path}/")
        return self

    def output(self, name: str) -> FileRef:
        """The named output; InputError lists what there is."""
        if name not in self.outputs:
            raise InputError(f"{self.stage} has no output {name}", where=self.path, value=", ".join(self.outputs))
        return self.outputs[name]


def receipt_path(stage: str, fingerprint: str) -> str:
    """The folder in which a stage keeps the outputs of one fingerprint."""
    return f"{stage}/{fingerprint[:16]}"
