"""What is wrong with a benchmark, before anything runs: missing data, impossible combinations, shares nobody can give.

Everything is looked at, so that one call counts all that must be put right, and names the first of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from raydiff import registry
from raydiff.config import DataConfig, component_options
from raydiff.contracts import Entry, Scorer
from raydiff.core.diffusion import Diffusion
from raydiff.core.metrics import PIXEL_METRICS
from raydiff.detector import BaselineDetector, DiffusionDetector, build_space, num_conditions, schedule_of
from raydiff.distillation import check_teacher
from raydiff.errors import ConfigError, DataError, RaydiffError
from raydiff.plan import Cell, Plan
from raydiff.planting import TrainedScorer
from raydiff.shards import ShardSet
from raydiff.shards.layout import plan_shards
from raydiff.storage import label_of

__all__ = ["check"]

_PROBE_IMAGES, _MAX_SHOWN = 16, 3


@dataclass(frozen=True)
class _Facts:
    """What is known of a data set before or after its shards are written."""

    num_normal_classes: int
    has_masks: bool


def check(plan: Plan, shard_place: Callable[[str], str]) -> None:
    """Refuse a plan that cannot work; writes nothing and trains nothing.

    Args:
        plan: what is about to run.
        shard_place: key of a data section -> the folder or URI of its shards; finished ones are looked at in place
            of the data set's files.

    Raises:
        ConfigError, DataError: of the kind of the first problem; names the suite file, its key, and all that is wrong.
    """
    problems: list[RaydiffError] = []
    facts: dict[str, _Facts] = {}
    for key, data in plan.shards.items():
        cell = next(cell for cell in plan.cells if cell.shards == key)
        try:
            facts[key] = _facts(data, shard_place(key))
        except RaydiffError as error:
            problems.append(type(error)(f"{_where(cell)}: {error}"))
    problems += _of_methods(plan, facts)
    problems += _of_metrics(plan, facts)
    problems += _of_robustness(plan)
    if problems:
        first, rest = problems[0], problems[1:]
        shown = [str(problem) for problem in rest[:_MAX_SHOWN]] + ["..."] * (len(rest) > _MAX_SHOWN)
        more = f" (and {len(rest)} more: {'; '.join(shown)})" if rest else ""
        raise type(first)(f"{plan.path}: {first}{more}")


def _where(cell: Cell) -> str:
    return f"datasets.{cell.dataset}" + (f" ({cell.category})" if cell.category else "")


def _facts(data: DataConfig, place: str) -> _Facts:
    """Of finished shards, else of the data set's files, which are listed and counted but for one image not opened."""
    if ShardSet.is_finished(place):
        shards = ShardSet.open(place, on_bad_shard=data.on_bad_shard)
        shards.check(data)
        if not shards.can_be_tested:
            raise DataError(
                f"{label_of(place)}: the test split lacks normal or anomalous images; a benchmark needs both kinds"
            )
        return _Facts(len(shards.normal_classes), shards.has_masks)
    dataset = registry.build("datasets", data.dataset)
    entries = [entry for shard in plan_shards(dataset.entries(), data) for entry in shard.entries]
    test = [entry for entry in entries if entry.split == "test"]
    anomalous = [entry for entry in test if entry.is_anomaly]
    if len(anomalous) in (0, len(test)):
        raise DataError(
            f"the test split has {len(test) - len(anomalous)} normal and {len(anomalous)} anomalous images; a benchmark"
            " needs both kinds"
        )
    normal = {entry.class_name for entry in entries if entry.split == "train"}
    return _Facts(len(normal), dataset.read(_first(anomalous))[1] is not None)


def _first(entries: Sequence[Entry]) -> Entry:
    return min(entries, key=lambda entry: entry.image_id)


def _of_methods(plan: Plan, facts: dict[str, _Facts]) -> Iterator[RaydiffError]:
    """Every method is built once per data set: untrained, with the first category's config."""
    for cell in _one_each(plan.cells):
        if cell.shards not in facts:
            continue
        try:
            if cell.baseline is not None:
                registry.build("baselines", cell.baseline, seed=cell.seed).check()
            else:
                classes = facts[cell.shards].num_normal_classes
                fresh = DiffusionDetector.create(cell.config, num_classes=classes)
                fresh.space.check()
                fresh.scorer.state()  # the weights that it needs are there
                if plan.suite.methods[cell.method].distil is not None:
                    check_teacher(fresh)
                    cell.config.override({"distillation": {"teacher": "0" * 64, "num_evaluations": 2}})  # it may be one
        except RaydiffError as error:
            yield type(error)(f"methods.{cell.method} on datasets.{cell.dataset}: {error}")


def _one_each(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of every method on every data set."""
    firsts: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        firsts.setdefault((cell.method, cell.dataset), cell)
    return list(firsts.values())


def _of_metrics(plan: Plan, facts: dict[str, _Facts]) -> Iterator[RaydiffError]:
    for name in dict.fromkeys(cell.dataset for cell in plan.cells if cell.shards in facts):
        known = {cell.shards: cell for cell in plan.cells if cell.dataset == name and cell.shards in facts}
        bare = next((cell for key, cell in known.items() if not facts[key].has_masks), None)
        pixel = [metric for metric in plan.suite.leading_metrics(name) if metric in PIXEL_METRICS]
        if not pixel:
            continue
        cells = [cell for cell in _one_each(plan.whole) if cell.dataset == name]  # not those that are left alone
        key = f"datasets.{name}.metrics" if pixel[0] in plan.suite.datasets[name].metrics else "metrics"
        if bare is not None:
            yield ConfigError(
                f"{key} names {pixel[0]}, which needs masks, and {_where(bare)} has none; leave it out, or list it"
                " under the metrics of the data sets that have masks"
            )
        elif not any(_draws_maps(cell, facts[next(iter(known))].num_normal_classes) for cell in cells):
            yield ConfigError(
                f"{key} names {pixel[0]}, which needs anomaly maps, and no method on datasets.{name} draws any"
                f" ({', '.join(cell.method for cell in cells)}); leave it out, or add one that does"
            )


def _draws_maps(cell: Cell, num_classes: int) -> bool:
    """Whether the method's scores come with maps, found out with a network that costs nothing."""
    if cell.config.tiles.size is not None:
        return True  # joined of the tiles', or of their scores
    data = cell.config.data
    images = torch.rand(_PROBE_IMAGES, data.channels, *data.image_size, generator=torch.Generator().manual_seed(0))
    try:
        if cell.baseline is not None:
            detector = BaselineDetector.fit(cell.config, cell.baseline, images)
            return detector.score(images[:1]).map is not None
        scorer: Scorer = registry.build("scorers", cell.config.scoring)
        if isinstance(scorer, TrainedScorer):
            return build_space(cell.config).shape[-2:] != (1, 1)
        model = Diffusion(
            denoiser=_Halved(), schedule=schedule_of(cell.config),
            prediction_type=cell.config.objective.prediction_type, seed=0,
            num_classes=num_conditions(cell.config, num_classes), device="cpu",
        )  # fmt: skip
        evidence = scorer.measure(model, torch.zeros(1, *build_space(cell.config).shape))
    except RaydiffError:
        return False  # said elsewhere
    return evidence.shape[-2:] != (1, 1)


class _Halved(torch.nn.Module):
    """Predicts half of what it is shown."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        return 0.5 * x


def _of_robustness(plan: Plan) -> Iterator[RaydiffError]:
    asked = plan.suite.robustness
    if asked is None:
        return
    for name in asked.perturbations:
        try:
            kind = registry.build("perturbations", component_options("perturbations", name)).kind
        except ConfigError as error:
            yield ConfigError(f"robustness.perturbations: {error}")
            continue
        if kind != "corruption":
            yield ConfigError(f"robustness.perturbations: {name} makes an image anomalous; name corruptions only")
    for severity in asked.severities:
        if not 1 <= severity <= 5:
            yield ConfigError(f"robustness.severities holds {severity}; each must be a whole number from 1 to 5")
    for budget in asked.attacks:
        if not 0 < budget <= 2:
            yield ConfigError(f"robustness.attacks holds {budget}; a budget must lie above 0 and not above 2")
