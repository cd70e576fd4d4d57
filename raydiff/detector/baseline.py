"""The detector that is a baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from raydiff import registry
from raydiff.config import ExperimentConfig, Options
from raydiff.contracts import Baseline, Scores
from raydiff.core.calibration import Origin
from raydiff.detector.contract import Detector, with_peaks
from raydiff.detector.sharing import BaselineOnBackbone, OnBackbone
from raydiff.detector.tiles import Tiles

__all__ = ["BaselineDetector"]


@dataclass(frozen=True, eq=False, kw_only=True)
class BaselineDetector(Detector):
    """A classic detector behind the same contract."""

    options: Options
    baseline: Baseline

    @classmethod
    def fit(
        cls, config: ExperimentConfig, options: Options, images: Tensor, *, provenance: Mapping[str, Any] | None = None
    ) -> Self:
        """Fit on normal images, (n, C, H, W), or on tiles of them where the config has tiles."""
        baseline: Baseline = registry.build("baselines", options, seed=config.seed)
        detector = cls(config=config, provenance=provenance or {}, options=options, baseline=baseline)
        detector._check_images(images, config.model_size)
        baseline.fit(images)
        return detector

    @property
    def name(self) -> str:
        """The baseline's."""
        return self.options.name

    @property
    def pretrained(self) -> str | None:
        """The baseline's."""
        return self.baseline.pretrained

    @property
    def num_evaluations(self) -> int | None:
        """None: there is no network."""
        return None

    def observe(self, images: Tensor) -> Tensor:
        """Scores, and the peaks of maps where there are any, (B, 1 or 2)."""
        scores = with_peaks(self.score(images))
        columns = [scores.image.double()] + ([] if scores.map is None else [scores.map.flatten().double()])
        return torch.stack(columns, 1)

    def cross_fitted(self, observed: Tensor, groups: Tensor | None = None) -> Scores:  # noqa: ARG002
        """The scores as they are: nothing is fitted on calibration images."""
        peaks = observed[:, 1:]
        return Scores(observed[:, 0], peaks[:, :, None, None] if peaks.shape[1] else None)

    def calibrate_observed(
        self,
        observed: Tensor,
        *,
        data_digest: str | None = None,
        groups: Tensor | None = None,
        origin: Origin = "set_aside",
    ) -> Self:
        """The threshold from the scores of normal images that the baseline was not fitted on."""
        calibration = self._make_calibration(self.cross_fitted(observed), data_digest, groups, origin)
        return replace(self, calibration=calibration, artifact_digest=None)

    @property
    def has_gradient(self) -> bool:
        """Whether the baseline has a surrogate."""
        return hasattr(self.baseline, "surrogate")

    def surrogate(self, images: Tensor) -> Tensor:
        """See :meth:`Detector.surrogate`: the baseline's, where it has one."""
        surrogate: Callable[[Tensor], Tensor] | None = getattr(self.baseline, "surrogate", None)
        if surrogate is None:
            return super().surrogate(images)
        if self.tiles is None:
            return surrogate(images)
        return self.tiles.evidence(lambda x: surrogate(x)[:, None, None, None], images).flatten(1).amax(1)

    @property
    def tiles(self) -> Tiles | None:
        """How images are tiled; None where the baseline sees them whole."""
        return Tiles.of(self.config)

    def _score(self, images: Tensor) -> Scores:
        """Of tiles: the joined map of theirs, or of their scores where there is none, and its highest value."""
        if self.tiles is None:
            return self.baseline.score(images)
        return self.joined(self.tiles.evidence(lambda tiles: _map_of(self.baseline.score(tiles)), images))

    @property
    def device(self) -> str:
        """``cpu``, wherever the members of an ensemble are."""
        return "cpu"

    @property
    def eye(self) -> OnBackbone | None:
        """The baseline, where it sees images through a backbone alone and can go on from what it sees."""
        return self.baseline if isinstance(self.baseline, BaselineOnBackbone) else None

    def measured(self, seen: Tensor) -> Tensor:
        """Maps of tiles, (b, 1, h, w), from what the baseline saw of them."""
        return _map_of(self.scored(seen))

    def scored(self, seen: Tensor) -> Scores:
        """Scores of whole images, or of tiles, from what the baseline saw of them."""
        assert isinstance(self.baseline, BaselineOnBackbone)  # noqa: S101
        return self.baseline.scored(seen)

    def joined(self, evidence: Tensor) -> Scores:
        """Scores of images from their tiles' maps, joined, (B, 1, H', W')."""
        assert self.tiles is not None  # noqa: S101
        return Scores(evidence.flatten(1).amax(1), self.tiles.enlarged(evidence))

    def _describe(self) -> dict[str, Any]:
        return {"kind": "baseline", "baseline": self.options.model_dump(mode="json")}

    def _weights(self) -> dict[str, Tensor]:
        return self.baseline.state()


def _map_of(scores: Scores) -> Tensor:
    return scores.image[:, None, None, None] if scores.map is None else scores.map
