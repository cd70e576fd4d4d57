"""What an endpoint is started with: one frozen model, the arguments of the Serve application and of its config file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydiff.errors import ConfigError
from raydiff.service import Limits

__all__ = ["ServeSettings"]

_LARGEST, _FEW = 16, 4


class ServeSettings(BaseModel):
    """How an artefact is served. Every path is that of the machines the replicas run on; ``artifact`` and ``shadow``
    may be URIs such as ``s3://bucket/run`` too, of which each machine keeps a copy.

    ``target_fpr`` is in force until another is set by HTTP; None is each artefact's own. ``artifact_root`` allows
    rolling to artefacts below it by HTTP. A replica takes up to ``max_ongoing`` images at a time, and ``max_queued``
    more wait for a place; what comes then is refused. ``compile`` has each replica compile an artefact's networks
    before it answers (:mod:`raydiff.compiling`). ``timeout_s`` is from a request's head to its answer,
    ``roll_timeout_s`` from a roll's head until every replica has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    artifact: str
    target_fpr: float | None = Field(None, gt=0, lt=1)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing: float = Field(8.0, gt=0)
    max_queued: int = Field(64, ge=1)
    max_batch_size: int | None = Field(None, ge=1, le=1024)
    batch_wait_ms: float = Field(0.0, ge=0)
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    compile: bool = False
    timeout_s: float = Field(30.0, gt=0)
    roll_timeout_s: float = Field(300.0, gt=0)
    max_mb: float = Field(32.0, gt=0)
    max_pixels: int = Field(64_000_000, ge=1)
    max_images: int = Field(64, ge=1)
    api_key_file: str | None = None
    artifact_root: str | None = None
    shadow: str | None = None
    shadow_share: float = Field(0.1, gt=0, le=1)
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(60.0, ge=0)

    @model_validator(mode="after")
    def _replicas_agree(self) -> ServeSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, more than max_replicas ({self.max_replicas})")
        return self

    @classmethod
    def of(cls, values: dict[str, Any]) -> ServeSettings:
        """From plain values; paths are made absolute.

        Raises:
            ConfigError: a value cannot be used; names it.
        """
        paths = ("artifact", "api_key_file", "artifact_root", "shadow")
        made = {name: _absolute(str(value)) if name in paths and value else value for name, value in values.items()}
        try:
            return cls.model_validate(made)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "settings"
            raise ConfigError(f"{where}: {first['msg']}; see raydiff serve --help") from error

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where replicas score: on a GPU where they get any of one."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    @property
    def max_ongoing(self) -> int:
        """Images in one replica: a batch being scored and the next one being decoded."""
        return 2 * self.largest_batch

    @property
    def largest_batch(self) -> int:
        """Images in one call of the detector, at most."""
        return self.max_batch_size or _LARGEST

    def batch_for(self, images_per_call: int) -> int:
        """The largest batch for a detector.

        Where none was asked for it is what the detector takes in one call anyway: more makes no image cheaper and all
        of them later. But no fewer than a few, which share what a batch costs beside scoring.
        """
        return self.max_batch_size or min(_LARGEST, max(_FEW, images_per_call))

    @property
    def places(self) -> int:
        """Images that all replicas hold, and those that may wait."""
        return self.max_queued + self.max_replicas * self.max_ongoing

    @property
    def limits(self) -> Limits:
        """What one image may cost."""
        return Limits(int(self.max_mb * 1_000_000), self.max_pixels)

    @property
    def digest(self) -> str:
        """Of all settings, hex: two applications that differ never take over each other's state."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().absolute())
