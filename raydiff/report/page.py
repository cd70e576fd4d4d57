"""The page: evaluations to HTML."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from raydiff.errors import ConfigError, StorageError
from raydiff.report import figures, tables, words
from raydiff.report.tables import Group
from raydiff.results import Comparison, Evaluation, Picture, Predictions, Result, compare

__all__ = ["write_report"]

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


def write_report(
    evaluations: Sequence[Evaluation],
    path: str | Path,
    *,
    title: str = "Anomaly detection report",
    main: str | None = None,
) -> Path:
    """Write one HTML file with everything in it; returns its path.

    Rows without predictions still fill the tables; curves, histograms and the gallery need them.

    Args:
        evaluations: of any number of detectors, data sets and seeds; of several runs of one seed the last is shown.
        path: the file.
        title: its heading.
        main: the detector whose summary and gallery are shown; by default the one with a network (else any) that has
            the highest AUROC on the first data set.

    Raises:
        ConfigError: there is no evaluation, or none of ``main``.
        StorageError: the file cannot be written.
    """
    if not evaluations:
        raise ConfigError("a report needs at least one evaluation; run raydiff evaluate first")
    datasets = tables.group(evaluations)
    names = [group.detector for groups in datasets.values() for group in groups]
    if main is not None and main not in names:
        raise ConfigError(f"main is {main!r}; the results hold {', '.join(dict.fromkeys(names))}")
    html = _render(title, datasets, main or _choose_main(next(iter(datasets.values()))), compare(evaluations))
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror}); choose another place") from error
    return target


def _choose_main(groups: Sequence[Group]) -> str:
    return max(groups, key=lambda group: (group.has_network, group.auroc)).detector


def _render(title: str, datasets: dict[str, list[Group]], main: str, comparisons: Sequence[Comparison]) -> str:
    source = files("raydiff.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    template = environment.from_string(source.joinpath("page.html").read_text(encoding="utf-8"))
    evaluations = [e for groups in datasets.values() for group in groups for e in group.evaluations]
    rows = [evaluation.rows[0] for evaluation in evaluations]
    detectors, overview = tables.overview_table(datasets)
    return template.render(
        title=title,
        css=Markup(source.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704 (our own file)
        created=max(row.created for row in rows)[:10],
        overview={"detectors": detectors, "rows": overview, "mixed": any(row.mark for row in overview)}
        if len(datasets) > 1
        else None,
        sections=[
            _section(f"d{i}", dataset, groups, main, [c for c in comparisons if c.dataset == dataset])
            for i, (dataset, groups) in enumerate(datasets.items())
        ],
        provenance=_provenance(rows),
        superseded=words.superseded_note(sum(evaluation.superseded for evaluation in evaluations)),
        glossary=words.GLOSSARY,
    )


def _section(
    name: str, dataset: str, groups: Sequence[Group], main: str, comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """All that is shown of one data set."""
    chosen = next((group for group in groups if group.detector == main), None)
    chosen = chosen or next(group for group in groups if group.detector == _choose_main(groups))
    columns, rows = tables.main_table(groups, chosen.detector)
    differences, defects = tables.difference_table(comparisons), tables.defect_table(groups)
    looks = figures.styles([group.detector for group in groups], chosen.detector)
    roc = figures.roc_figure(groups, looks, f"{name}-roc")
    return {
        "id": name,
        "dataset": dataset,
        "main": chosen.detector,
        "detectors": [group.detector for group in groups],
        "summary": words.summary(groups, chosen, comparisons),
        "columns": columns,
        "parts": [(part, len(list(members))) for part, members in groupby(columns, key=lambda column: column.part)],
        "rows": rows,
        "note": words.interval_note(groups),
        "warnings": words.warnings(groups, [*rows, *differences, *defects]),
        "target_fpr": chosen.rows[0].target_fpr,
        "differences": differences,
        "defects": defects,
        "roc": _markup(roc),
        "cost": _markup(figures.cost_figure(groups, looks, f"{name}-cost")),
        "hardware": ", ".join(dict.fromkeys(row.hardware for group in groups for row in group.rows)),
        "roc_note": words.roc_note(groups),
        "bars": words.spread_note(groups),
        "histograms": _histograms(name, groups),
        "gallery": _gallery(chosen.evaluations[0]),
    }


def _breakable(text: str) -> Markup:
    """The text, with places where a narrow screen may break it."""
    return escape(text).replace("/", Markup("/<wbr>")).replace("_", Markup("_<wbr>"))


def _markup(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)  # noqa: S704 (drawn by matplotlib, which escapes text)


def _histograms(name: str, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One figure per detector, of its first seed."""
    shown = []
    for i, group in enumerate(groups):
        row, predictions = group.rows[0], group.evaluations[0].predictions
        if predictions is not None:
            svg = figures.histogram_figure(predictions, row.threshold, f"{name}-h{i}")
            shown.append({"detector": group.detector, "seed": row.seed, "svg": _markup(svg)})
    return shown


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


def _gallery(evaluation: Evaluation) -> list[dict[str, Any]]:
    predictions, row = evaluation.predictions, evaluation.rows[0]
    if predictions is None:
        return []
    shown = []
    for kind, (heading, explanation, nothing) in _KINDS.items():
        cards = [_card(picture, predictions) for picture in evaluation.pictures if picture.kind == kind]
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


def _provenance(rows: Sequence[Result]) -> dict[str, Any]:
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
