"""The shapes of requests and answers, for OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["BatchAnswer", "Problem", "RollAnswer", "ScoreAnswer", "ThresholdAnswer", "documented", "image_body"]


class Problem(BaseModel):
    """Why a request was refused, and what to do (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


class Box(BaseModel):
    """Pixels of the upright original."""

    x: int
    y: int
    width: int
    height: int
    peak: float
    area: float


class HeatScale(BaseModel):
    """Values of the anomaly map at the bottom, the middle and the top of the colours."""

    low: float
    middle: float
    high: float


class Pictures(BaseModel):
    """PNG files in base64; null where the detector has no such thing."""

    heat_map: str | None
    heat_layer: str | None
    reconstruction: str | None


class Explanation(BaseModel):
    """Where the image is anomalous."""

    boxes: list[Box]
    num_regions: int
    heat_scale: HeatScale | None
    pictures: Pictures


class ScoreAnswer(BaseModel):
    """What the artefact says about one image; a score above the threshold is anomalous."""

    score: float
    p_value: float
    threshold: float
    target_fpr: float
    verdict: Literal["normal", "anomalous"]
    artifact_id: str
    image: str = Field(description="SHA-256 of the bytes")
    format: str
    height: int
    width: int
    batch_size: int
    timing_ms: dict[str, float]
    explanation: Explanation | None


class BatchItem(BaseModel):
    """One file of a batch: its answer, or its problem."""

    name: str
    answer: ScoreAnswer | None
    problem: Problem | None


class BatchAnswer(BaseModel):
    """One result per file, in order."""

    results: list[BatchItem]


class ThresholdAnswer(BaseModel):
    """The threshold in force."""

    model_config = ConfigDict(extra="allow")

    value: float
    target_fpr: float


class RollAnswer(BaseModel):
    """What is live now; ``settled`` when every replica that answers has it."""

    artifact_id: str
    previous_artifact_id: str | None


def documented(*statuses: int, answer: type[BaseModel] | None = None, png: bool = False) -> dict[int | str, Any]:
    """FastAPI's ``responses``: the answer, and a problem for each of the statuses."""
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    found: dict[int | str, Any] = {
        status: {"description": "A problem, with what to do", "content": problem} for status in (*statuses, 401)
    }
    if answer is not None:
        found[200] = {"model": answer}
    if png:
        found[200]["content"] = {"image/png": {"schema": {"type": "string", "format": "binary"}}}
    return found


def image_body(*, batch: bool = False) -> dict[str, Any]:
    """OpenAPI's ``requestBody`` of an operation that takes images."""
    binary = {"type": "string", "format": "binary"}
    if batch:
        files = {"type": "object", "required": ["files"],
                 "properties": {"files": {"type": "array", "minItems": 1, "items": binary}}}  # fmt: skip
        return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": files}}}}
    form = {"type": "object", "required": ["file"], "properties": {"file": binary}}
    encoded = {"type": "object", "required": ["image"], "additionalProperties": False,
               "properties": {"image": {"type": "string", "format": "byte"}}}  # fmt: skip
    kinds = {f"image/{kind}": {"schema": binary} for kind in ("png", "jpeg", "webp", "bmp", "tiff")}
    content = kinds | {
        "application/octet-stream": {"schema": binary},
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": encoded},
    }
    return {"requestBody": {"required": True, "content": content}}


def json_body(**properties: Any) -> dict[str, Any]:
    """OpenAPI's ``requestBody`` of a JSON object with these properties, all required."""
    schema = {"type": "object", "additionalProperties": False, "required": list(properties), "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
