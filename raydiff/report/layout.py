"""What the pages share: the template environment, galleries, provenance."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from raydiff.results import Evaluation, Picture, Predictions, Result

__all__ = ["gallery", "markup", "provenance", "render"]

_KINDS = {
    "miss": (
        "Worst misses",
        "Anomalous images called normal, the lowest score first.",
        "No anomalous image was missed.",
    ),
    "false_alarm": (
        "Worst false alarms",
        "Normal images called anomalous, the highest score first.",
        "No normal image raised an alarm.",
    ),
    "hit": ("Best hits", "Anomalous images found, the highest score first.", "No anomalous image was found."),
}
_PIXELATED_BELOW = 64


def render(page: str, **values: Any) -> str:
    """The page of this name beside this module, filled in."""
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    css = Markup(_read("page.css"))  # noqa: S704 (our own file)
    return environment.get_template(page).render(css=css, **values)


def _read(name: str) -> str:
    return files("raydiff.report").joinpath(name).read_text(encoding="utf-8")


def _breakable(text: str) -> Markup:
    """The text, with places where a narrow screen may break it."""
    return escape(text).replace("/", Markup("/<wbr>")).replace("_", Markup("_<wbr>"))


def markup(svg: str | None) -> Markup | None:
    """A figure as part of the page; None stays None."""
    return None if svg is None else Markup(svg)  # noqa: S704 (drawn by matplotlib, which escapes text)


@dataclass(frozen=True)
class _Card:
    """One image of the gallery; ``views`` are (name, data URI, alternative text)."""

    image_id: str
    defect: str
    score: str
    p_value: str
    verdict: str
    views: list[tuple[str, str, str]]
    pixelated: bool


def gallery(evaluation: Evaluation, limit: int | None = None) -> list[dict[str, Any]]:
    """Misses, false alarms and hits as cards, at most ``limit`` of each; empty without predictions."""
    predictions, row = evaluation.predictions, evaluation.rows[0]
    if predictions is None:
        return []
    shown = []
    for kind, (heading, explanation, nothing) in _KINDS.items():
        cards = [_card(picture, predictions) for picture in evaluation.pictures if picture.kind == kind][:limit]
        there = _count_of(kind, predictions)
        if cards or not there:
            shown.append({"heading": heading, "explanation": explanation, "nothing": nothing, "cards": cards,
                          "total": there, "seed": row.seed, "threshold": f"{row.threshold:.4g}"})  # fmt: skip
    return shown


def _count_of(kind: str, predictions: Predictions) -> int:
    labels, verdicts = predictions.labels, predictions.verdicts
    chosen = {"miss": labels & ~verdicts, "false_alarm": ~labels & verdicts, "hit": labels & verdicts}[kind]
    return int(chosen.sum())


def _card(picture: Picture, predictions: Predictions) -> _Card:
    i = picture.index
    image_id = predictions.ids[i]
    views = [
        (name, f"data:image/png;base64,{base64.b64encode(data).decode()}", f"{name} of {image_id}")
        for name, data in (
            ("input", picture.image),
            ("reconstruction", picture.reconstruction),
            ("heat map", picture.heat_map),
            ("true mask", picture.mask),
        )
        if data is not None
    ]
    return _Card(
        image_id, predictions.defects[i], f"{predictions.scores[i]:.4g}", f"{predictions.p_values[i]:.3f}",
        "anomalous" if predictions.verdicts[i] else "normal", views, max(_png_size(picture.image)) < _PIXELATED_BELOW,
    )  # fmt: skip


def _png_size(data: bytes) -> tuple[int, int]:
    """Width and height, from the header."""
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def provenance(rows: Sequence[Result]) -> dict[str, Any]:
    """What all runs share said once, what differs in a table, each distinct config in full."""
    configs = {row.config_digest: row.config for row in rows if row.config is not None}
    common = {
        "Source commit": {row.commit or "not under version control" for row in rows},
        "Hardware": {f"{row.hardware} ({row.device})" for row in rows},
        "Versions": {", ".join(f"{name} {version}" for name, version in row.versions.items()) for row in rows},
        "Command": {row.command for row in rows if row.command},
        "Data digest": {row.data_digest for row in rows if row.data_digest},
        "Evaluated": {row.created for row in rows},
    }
    said = {name: sorted(values) for name, values in common.items() if values}
    if len(said["Evaluated"]) > 2:
        said["Evaluated"] = [f"{said['Evaluated'][0]} to {said['Evaluated'][-1]}"]
    return {
        "common": said,
        "runs": [
            {"run": row.run, "detector": row.detector, "dataset": row.dataset, "seed": row.seed,
             "artifact": row.artifact_digest or "not saved", "config": row.config_digest,
             "threshold": f"{row.threshold:.6g}", "target_fpr": row.target_fpr, "batch_size": row.batch_size}
            for row in rows
        ],
        "configs": {digest: json.dumps(config, indent=2) for digest, config in configs.items()},
    }  # fmt: skip
