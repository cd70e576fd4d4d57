"""What a trained network says about the selection split, measured once and used by every setting that asks for it.

A scorer's options fall apart: those of :class:`raydiff.judgement.JudgeOptions` say what is made of evidence, the others
what is measured. Of a :class:`raydiff.contracts.StepScorer` each step is remembered by itself, so that settings with
other steps ask the network at the new ones alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.config import ExperimentConfig, Options
from raydiff.contracts import Scorer, SequentialScorer, StepScorer
from raydiff.cost import measure_cost
from raydiff.detector import DiffusionDetector
from raydiff.errors import ConfigError, DataError, ShapeError
from raydiff.heads import with_trained_scorer
from raydiff.images import ImageSpec, images_per_batch, to_tensor
from raydiff.judgement import Judge, JudgeOptions
from raydiff.planting import TrainedScorer
from raydiff.selection import fold_statistics, judged, selection_set
from raydiff.shards import ShardSet
from raydiff.sweep.recent import Recent

__all__ = ["Evidence", "EvidenceCache"]

_MIN_NORMAL = 4
_SCORE_BYTES = 64 * 10**6
_JUDGEMENT = frozenset(JudgeOptions.model_fields) - {"name"}
_STEPS = frozenset({"start", "stop", "num_inference_steps"})
"""Options that choose a StepScorer's steps; see the contract."""
_EXITS = frozenset({"early_exit", "exit_fpr"})
"""Options that say when a SequentialScorer stops: its evidence has all steps."""

Name = tuple[str, tuple[int, ...]]
"""Of evidence: the options that it depends on, and the steps of one that stands by step."""
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


class Evidence(NamedTuple):
    """Of n normal images and of the anomalies made of them: float32 (n, K, H, W) each."""

    normals: Tensor
    twins: Tensor


class EvidenceCache:
    """A detector's evidence of normal images and of their anomalous twins, under any scorer's options.

    Of the configs that its methods are given, ``scoring`` and ``calibration`` count; all else is the detector's own.
    For one thread at a time.
    """

    num_measured: int
    """Network evaluations per image so far."""
    num_reused: int
    """Network evaluations per image that settings asked for and that were remembered."""

    def __init__(
        self,
        detector: DiffusionDetector,
        normals: NDArray[np.uint8],
        twins: NDArray[np.uint8],
        *,
        limit_mb: int = 2048,
        prepare: Callable[[DiffusionDetector], DiffusionDetector] | None = None,
    ) -> None:
        """Nothing is measured yet.

        Args:
            detector: trained; its own calibration does not matter.
            normals: normal images that it was not trained on, uint8 (n, H, W, C), n at least 4.
            twins: an anomaly made of each, in the same order.
            limit_mb: megabytes of evidence that are remembered; the longest unused is dropped first. The setting at
                hand and the encoded images come on top.
            prepare: trains a scorer's own network, where it has one: once for all settings that train the same.

        Raises:
            ShapeError: there is not one twin for each image.
            ConfigError: there are fewer than 4 images.
        """
        if normals.shape != twins.shape:
            raise ShapeError(f"images are {normals.shape} and their twins {twins.shape}; give one twin each")
        if len(normals) < _MIN_NORMAL:
            raise ConfigError(
                f"{len(normals)} calibration image(s); a sweep needs at least {_MIN_NORMAL}, better 50 or more: raise"
                " data.calibration_fraction, or add normal images"
            )
        self.detector, self.model = detector, detector.model
        self.normals, self.twins = normals, twins
        self.num_measured = self.num_reused = 0
        self._latents = None if detector.tiles else self._encoded(np.concatenate([normals, twins]))  # (2 n, C, H, W)
        self._maps = Recent[Tensor](limit_mb * 10**6)  # (2 n, K, H, W) by (options, None), or of one step
        self._fitted = Recent[list[dict[str, Tensor]]](limit_mb * 10**6 // 8)
        self._scores = Recent[Pair](_SCORE_BYTES)
        self._asked: DiffusionDetector | None = None
        self._prepare, self._heads = prepare, dict[str, dict[str, Tensor]]()
        self._last: tuple[Name, Evidence] | None = None
        self._milliseconds: dict[str, float] = {}

    @classmethod
    def of(
        cls,
        detector: DiffusionDetector,
        shards: ShardSet,
        *,
        seed: int = 0,
        severity: int = 3,
        kinds: Sequence[str] = (),
        max_images: int | None = None,
        limit_mb: int = 2048,
    ) -> Self:
        """On the calibration normals and their synthetic anomalies; opens no shard of another split.

        Args:
            detector: trained on the same shards.
            shards: finished ones.
            seed: of the anomalies.
            severity: of the anomalies, 1 to 5.
            kinds: of the anomalies; every one there is where it is empty.
            max_images: the first so many normals; all of them by default.
            limit_mb: see the class.

        Raises:
            ConfigError: there are fewer than 4 calibration images.
            DataError: there are none, or one cannot be read.
        """
        images, ids = _calibration(detector.config, shards, max_images)
        made = selection_set(images, ids, seed, severity=severity, kinds=kinds)

        def prepare(one: DiffusionDetector) -> DiffusionDetector:
            found = with_trained_scorer(one, shards, without=one.provenance.get("suspects", {}))
            assert isinstance(found, DiffusionDetector)  # noqa: S101
            return found

        normals, twins = made.images[: len(ids)], made.images[len(ids) :]
        return cls(detector, normals, twins, limit_mb=limit_mb, prepare=prepare)

    @property
    def num_normal(self) -> int:
        """n, normal images; there are as many anomalous ones."""
        return len(self.normals)

    def evidence(self, config: ExperimentConfig) -> Evidence:
        """What the config's scorer measures, bit for bit that of :meth:`DiffusionDetector.measure`.

        Raises:
            ConfigError: the network cannot be scored so: fewer steps than asked for, or steps or conditions that it
                was not trained for.
        """
        return self._named(config.scoring)[1]

    def _named(self, scoring: Options) -> tuple[Name, Evidence]:
        """Evidence and what it is of; the last is kept as it is, since judgement may be all that changes."""
        scorer = self._with(scoring).scorer
        by_step = isinstance(scorer, StepScorer) and scorer.by_step(self.model)
        steps = tuple(scorer.timesteps(self.model.schedule)) if by_step else ()
        key = _evidence_key(scoring, by_step=by_step)
        nfe = scorer.num_evaluations(self.model)
        if self._last is not None and self._last[0] == (key, steps):
            self.num_reused += nfe
            return self._last
        if isinstance(scorer, StepScorer) and by_step:
            whole = self._of_steps(scorer, key, steps, nfe)
        else:
            whole = self._of_all(scorer, key, nfe)
        self._last = (key, steps), Evidence(whole[: self.num_normal], whole[self.num_normal :])
        return self._last

    def judged(self, config: ExperimentConfig) -> Pair:
        """Image scores of the normals and of their twins, (n,) each, by :func:`raydiff.selection.judged`.

        Statistics come from ``calibration.max_images`` normals, less those of the image's own of ``calibration.folds``.

        Raises:
            ConfigError: as :meth:`evidence`, or a density cannot be fitted.
        """
        limit = min(config.calibration.max_images or self.num_normal, self.num_normal)
        folds = min(config.calibration.folds, limit)
        key = (config.scoring.model_dump_json(), folds, limit)
        scores = self._scores.get(key)
        if scores is not None:
            self.num_reused += self.num_evaluations(config)
            return scores
        name, evidence = self._named(config.scoring)
        scorer = self._with(config.scoring).scorer
        size = (evidence.normals.shape[2], evidence.normals.shape[3])  # maps larger than evidence are not needed here
        fit_key = scorer.fit_key() if isinstance(scorer, Judge) else key
        statistics = self._statistics(scorer, evidence.normals[:limit], folds, (name, fit_key, limit, folds))
        scores = judged(scorer, *evidence, size, statistics=statistics)
        self._scores.put(key, scores, 2 * scores[0].nbytes)
        return scores

    def num_evaluations(self, config: ExperimentConfig) -> int:
        """NFE of the config's scorer: network evaluations per image."""
        return self._with(config.scoring).scorer.num_evaluations(self.model)

    def ms_per_image(self, config: ExperimentConfig) -> float:
        """Milliseconds from pixels to verdict at batch size 1, by :func:`raydiff.cost.measure_cost`.

        Timed once for all settings that differ in judgement, in which steps are looked at and in other numbers with a
        fraction: judging costs next to nothing beside the network. A scorer that stops early is timed by itself: all
        of its options say when.

        Raises:
            ConfigError: as :meth:`evidence`.
        """
        detector = self._with(config.scoring)
        nfe = detector.scorer.num_evaluations(self.model)
        stops = isinstance(detector.scorer, SequentialScorer) and detector.scorer.stops_early
        key = f"{nfe} {config.scoring.model_dump_json() if stops else _cost_key(config.scoring)}"
        if key not in self._milliseconds:
            calibrated = detector.calibrate_measured(self.evidence(config).normals)
            self._milliseconds[key] = measure_cost(calibrated, self.normals, (1,)).ms_per_image[1]
        return self._milliseconds[key]

    def _with(self, scoring: Options) -> DiffusionDetector:
        """The detector with these options; the last one is kept."""
        if self._asked is None or self._asked.config.scoring != scoring:
            self._asked = self._with_head(self.detector.with_scoring(scoring))
        return self._asked

    def _with_head(self, detector: DiffusionDetector) -> DiffusionDetector:
        """The detector, its scorer's own network trained, or as it was trained for another setting."""
        scorer = detector.scorer
        if not isinstance(scorer, TrainedScorer) or scorer.is_trained or self._prepare is None:
            return detector
        key = scorer.training_key()
        if key not in self._heads:
            self._heads[key] = self._prepare(detector).scorer.state()
        scorer.load_state(self._heads[key])
        return detector

    def _of_steps(self, scorer: StepScorer, key: str, steps: tuple[int, ...], nfe: int) -> Tensor:
        """(2 n, K, H, W), of which only the steps that are not known are measured."""
        remembered = {step: self._maps.get((key, step)) for step in steps}
        known = {step: maps for step, maps in remembered.items() if maps is not None}
        missing = [step for step, maps in remembered.items() if maps is None]
        if missing:
            fresh = self._measured(lambda x: scorer.measure_steps(self.model, x, missing))
            for i, step in enumerate(missing):
                known[step] = fresh[:, i : i + 1].clone()  # by itself, so that it can be dropped by itself
                self._maps.put((key, step), known[step], known[step].nbytes)
        per_step = nfe // len(steps)
        self.num_measured += per_step * len(missing)
        self.num_reused += nfe - per_step * len(missing)
        return torch.cat([known[step] for step in steps], 1)

    def _of_all(self, scorer: Scorer, key: str, nfe: int) -> Tensor:
        """(2 n, K, H, W) of a scorer whose steps belong together."""
        whole = self._maps.get((key, None))
        if whole is None:
            whole = self._measured(lambda x: scorer.measure(self.model, x))
            self._maps.put((key, None), whole, whole.nbytes)
            self.num_measured += nfe
        else:
            self.num_reused += nfe
        return whole

    def _statistics(self, scorer: Scorer, normals: Tensor, folds: int, key: Hashable) -> Sequence[Mapping[str, Tensor]]:
        """Per fold; kept for settings that differ in blur or pooling alone."""
        found = self._fitted.get(key)
        if found is None:
            found = fold_statistics(scorer, normals, folds)
            self._fitted.put(key, found, sum(value.nbytes for fold in found for value in fold.values()))
        return found

    def _measured(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """(2 n, K, H, W) from a function of what is diffused; tiles are encoded each time, images once."""
        size = images_per_batch(self.detector.config)
        if self._latents is not None:
            return torch.cat([function(x) for x in torch.split(self._latents, size)])
        parts = [
            self.detector.measured_by(function, to_tensor(images[i : i + size]))
            for images in (self.normals, self.twins)
            for i in range(0, len(images), size)
        ]
        return torch.cat(parts)

    def _encoded(self, images: NDArray[np.uint8]) -> Tensor:
        size = images_per_batch(self.detector.config)
        parts = [self.detector.encode(to_tensor(images[i : i + size])) for i in range(0, len(images), size)]
        return torch.cat(parts)


def _calibration(config: ExperimentConfig, shards: ShardSet, limit: int | None) -> tuple[NDArray[np.uint8], list[str]]:
    """The first calibration normals, uint8 (n, H, W, C), with their ids."""
    images, ids = [], list[str]()
    for part in shards.read("calibration", ImageSpec.of(config.data), on_bad_image=config.data.on_bad_image):
        images.append(part.images)
        ids += part.ids
        if limit is not None and len(ids) >= limit:
            break
    if not ids:
        raise DataError(f"{shards.label}: has no calibration images; raise data.calibration_fraction and prepare again")
    return np.concatenate(images)[:limit], ids[:limit]


def _evidence_key(options: Options, *, by_step: bool) -> str:
    """The same for options that measure the same, steps aside where they stand alone."""
    dropped = (_JUDGEMENT if isinstance(options, JudgeOptions) else frozenset()) | (_STEPS if by_step else frozenset())
    dropped |= _EXITS
    return json.dumps(options.model_dump(mode="json", exclude=set(dropped)), sort_keys=True)


def _cost_key(options: Options) -> str:
    """The same for options whose evidence takes the same time for the same number of evaluations."""
    fields = options.model_dump(mode="json", exclude=set(_JUDGEMENT))
    return json.dumps({k: v for k, v in fields.items() if not isinstance(v, float)}, sort_keys=True)
