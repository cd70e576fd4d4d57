"""The detector that is a diffusion model: a space, a network, a scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from raydiff.config import ExperimentConfig, Options
from raydiff.contracts import Scorer, Scores, SequentialScorer, Space
from raydiff.core.calibration import Origin
from raydiff.core.diffusion import Diffusion
from raydiff.detector.building import build_denoiser, build_scorer, build_space, num_conditions, schedule_of
from raydiff.detector.contract import Detector, with_peaks
from raydiff.detector.sharing import OnBackbone
from raydiff.detector.tiles import Tiles
from raydiff.errors import ConfigError
from raydiff.planting import TrainedScorer

__all__ = ["MIN_CALIBRATION", "DiffusionDetector", "too_few"]

MIN_CALIBRATION = 4
"""Images that are set aside for a threshold, at least."""
_JUDGED_TOGETHER = 256
"""Images whose maps are held at once in calibration."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DiffusionDetector(Detector):
    """A diffusion model, a space, a scorer, and what the scorer learnt from calibration normals."""

    network: nn.Module
    space: Space
    scorer: Scorer
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    device: str = "cpu"

    @classmethod
    def create(
        cls,
        config: ExperimentConfig,
        *,
        num_classes: int,
        provenance: Mapping[str, Any] | None = None,
        device: str = "cpu",
        space_state: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """An untrained detector; its network's weights follow from ``config.seed``, its space is ``space_state``'s."""
        space = build_space(config)
        Tiles.of(config, (space.shape[1], space.shape[2]))  # refuses tiles that cannot be joined
        if space_state:
            space.load_state(space_state)
        scorer = build_scorer(config, num_classes)  # refuses what cannot be scored before anything is trained
        return cls(
            config=config,
            provenance={"num_classes": num_classes, **(provenance or {})},
            network=build_denoiser(config, space, num_classes).eval().to(device),
            space=space,
            scorer=scorer,
            device=device,
        )

    @property
    def name(self) -> str:
        """Network and scorer, as in ``unet/denoising_error``, and whether the network is a student."""
        distilled = "" if self.config.distillation is None else " distilled"
        return f"{self.config.denoiser.name}/{self.config.scoring.name}{distilled}"

    @property
    def model(self) -> Diffusion:
        """The network with its schedule."""
        return Diffusion(
            denoiser=self.network,
            schedule=schedule_of(self.config),
            prediction_type=self.config.objective.prediction_type,
            seed=self.config.seed,
            num_classes=num_conditions(self.config, int(self.provenance["num_classes"])),
            device=self.device,
            decode=None if self.config.space.name == "pixel" else self._decoded,
        )

    @property
    def pretrained(self) -> str | None:
        """The space's, or the scorer's."""
        return self.space.pretrained or getattr(self.scorer, "pretrained", None)

    @property
    def num_evaluations(self) -> int | None:
        """NFE of the scorer, for each tile of an image."""
        return self.scorer.num_evaluations(self.model) * (len(self.tiles.tiling) if self.tiles else 1)

    @property
    def mean_evaluations(self) -> float | None:
        """NFE of the calibration normals in the mean, where images are asked as often as they need; None elsewhere."""
        scorer = self.scorer
        return scorer.mean_evaluations(self.statistics) if isinstance(scorer, SequentialScorer) else None

    @property
    def images_per_call(self) -> int:
        """The rows of the network's calls; one image where it is cut into tiles."""
        return 1 if self.tiles else self.model.rows_per_call(self.space.shape)

    @property
    def tiles(self) -> Tiles | None:
        """How images are tiled; None where the model sees them whole."""
        return Tiles.of(self.config, (self.space.shape[1], self.space.shape[2]))

    def with_scoring(self, scoring: Options) -> Self:
        """The same network with another scorer; it must be calibrated again.

        A scorer with a network of its own keeps this one's where the options train the same one; else it is to be
        trained first (:func:`raydiff.heads.with_trained_scorer`).
        """
        config = self.config.model_copy(update={"scoring": scoring})
        scorer, own = build_scorer(config, int(self.provenance["num_classes"])), self.scorer
        if _train_the_same(scorer, own):
            scorer.load_state(own.state())
        return replace(self, config=config, scorer=scorer, statistics={}, calibration=None, artifact_digest=None)

    def with_image_size(self, image_size: tuple[int, int]) -> Self:
        """The same network for images of another size in pixels, (height, width); it must be calibrated again.

        Raises:
            ConfigError: the network sees images whole, so that it knows one size only.
        """
        if self.tiles is None:
            raise ConfigError("tiles.size is not set, so data.image_size cannot change; train with tiles")
        config = self.config.override({"data.image_size": list(image_size)})
        return replace(self, config=config, statistics={}, calibration=None, artifact_digest=None)

    def encode(self, images: Tensor) -> Tensor:
        """What is diffused, (B, *space.shape) on the device of ``images``: what :meth:`measure` gives the scorer.

        Of a detector with tiles ``images`` are tiles.
        """
        return self.space.encode(images.to(self.device)).to(images.device)

    def measure(self, images: Tensor) -> Tensor:
        """The scorer's evidence, (B, K, H, W): what costs network evaluations. Tiles' is joined, at the kept cells."""
        return self.measured_by(self.measured, images)

    def measured_by(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Evidence of images from a function of what is diffused, (B, *space.shape) to (B, K, ., .)."""
        if self.tiles is None:
            return function(self.encode(images))
        return self.tiles.evidence(lambda tiles: function(self.encode(tiles)), images)

    def observe(self, images: Tensor) -> Tensor:
        """The scorer's evidence, (B, K, H, W), as of :meth:`measure`; 4 K H W bytes an image."""
        self._check_images(images)
        return self.measure(images)

    def cross_fitted(self, observed: Tensor, groups: Tensor | None = None) -> Scores:
        """Scores cross-fitted over ``config.calibration.folds``, in order; see :meth:`Detector.cross_fitted`.

        Scored with statistics that it helped to fit an image would look more normal than a new one does. Views of one
        lone image can only be scored with those of its other views.
        """
        if groups is None or not bool(groups.any()):
            groups = torch.arange(len(observed))
        folds = min(self.config.calibration.folds, int(groups.max()) + 1)
        rows, parts = list[Tensor](), list[Scores]()
        for fold in range(folds):
            inside = groups % folds == fold  # depends on the position alone
            statistics = self.scorer.fit(observed[~inside])
            members = inside.nonzero().flatten()
            for start in range(0, len(members), _JUDGED_TOGETHER):
                batch = members[start : start + _JUDGED_TOGETHER]
                rows.append(batch)
                parts.append(with_peaks(self.judged(observed[batch], statistics)))
        found, order = Scores.concatenate(parts), torch.cat(rows).argsort()
        return Scores(found.image[order], None if found.map is None else found.map[order])

    def calibrate_observed(
        self,
        observed: Tensor,
        *,
        data_digest: str | None = None,
        groups: Tensor | None = None,
        origin: Origin = "set_aside",
    ) -> Self:
        """Statistics from all images; the threshold from :meth:`cross_fitted` scores.

        Raises:
            ConfigError: there are fewer than 4 images; of those that were not set aside fewer than 2, or views of them.
        """
        limit = self.config.calibration.max_images
        if groups is None:  # else as many images as count were chosen, with all their views
            observed = observed[:limit]
        if len(observed) < (least := MIN_CALIBRATION if origin == "set_aside" else 2):
            raise too_few(len(observed), least)
        calibration = self._make_calibration(self.cross_fitted(observed, groups), data_digest, groups, origin)
        return replace(self, statistics=self.scorer.fit(observed), calibration=calibration, artifact_digest=None)

    def calibrate_measured(self, evidence: Tensor, *, data_digest: str | None = None) -> Self:
        """:meth:`calibrate_observed` of images that were set aside, from what :meth:`measure` gave, (n, K, H, W).

        Raises:
            ConfigError: there are fewer than 4 images.
        """
        return self.calibrate_observed(evidence, data_digest=data_digest)

    @property
    def has_gradient(self) -> bool:
        """Whether the scorer has a surrogate."""
        return hasattr(self.scorer, "surrogate")

    def surrogate(self, images: Tensor) -> Tensor:
        """See :meth:`Detector.surrogate`: the scorer's, of evidence measured with gradients."""
        if not self.has_gradient:
            return super().surrogate(images)
        model = replace(self.model, differentiable=True)
        evidence = self.measured_by(lambda x: self.scorer.measure(model, x), images)
        return self.scorer.surrogate(evidence, self.statistics)

    def _score(self, images: Tensor) -> Scores:
        return self.scored(self.encode(images)) if self.tiles is None else self.joined(self.measure(images))

    @property
    def eye(self) -> OnBackbone | None:
        """The space, where it sees images through a backbone alone."""
        return self.space if isinstance(self.space, OnBackbone) else None

    def measured(self, seen: Tensor) -> Tensor:
        """Evidence of whole images, or of tiles, from what :meth:`encode` gave of them."""
        return self.scorer.measure(self.model, seen)

    def scored(self, seen: Tensor) -> Scores:
        """Scores of whole images from what :meth:`encode` gave of them."""
        scorer = self.scorer
        if isinstance(scorer, SequentialScorer) and scorer.stops_early:
            return scorer.score(self.model, seen, self.statistics, self.config.data.image_size)
        return self.joined(self.measured(seen))

    def joined(self, evidence: Tensor) -> Scores:
        """Scores of images from their evidence, that of tiles joined already."""
        return self.judged(evidence, self.statistics)

    def judged(self, evidence: Tensor, statistics: Mapping[str, Tensor]) -> Scores:
        """Scores and maps of evidence, (B, K, H, W), with statistics that the scorer fitted; no network is asked."""
        if self.tiles is None:
            return self.scorer.judge(evidence, statistics, self.config.data.image_size)
        scores = self.scorer.judge(evidence, statistics, (evidence.shape[2], evidence.shape[3]))
        return replace(scores, map=None if scores.map is None else self.tiles.enlarged(scores.map))

    def _reconstruct(self, images: Tensor) -> Tensor | None:
        return self._rebuilt(images) if self.tiles is None else self.tiles.rebuilt(self._rebuilt, images)

    def _rebuilt(self, images: Tensor) -> Tensor | None:
        latents = self.scorer.reconstruct(self.model, self.encode(images))
        return None if latents is None else self._decoded(latents)

    def _decoded(self, latents: Tensor) -> Tensor | None:
        """Images, where ``latents`` are; made on the detector's device, which a space's network never leaves."""
        images = self.space.decode(latents.to(self.device))
        return None if images is None else images.to(latents.device)

    def _describe(self) -> dict[str, Any]:
        return {"kind": "diffusion"}

    def _weights(self) -> dict[str, Tensor]:
        weights = {f"denoiser.{name}": value for name, value in self.network.state_dict().items()}
        weights |= {f"scorer.{name}": value for name, value in self.scorer.state().items()} if self.scorer else {}
        return weights | {f"space.{name}": value for name, value in self.space.state().items()}

    def _statistics(self) -> dict[str, Tensor]:
        return dict(self.statistics)


def _train_the_same(scorer: Scorer, trained: Scorer) -> bool:
    """Whether a scorer's own network would come out as another's, which is trained."""
    if not isinstance(scorer, TrainedScorer) or not isinstance(trained, TrainedScorer):
        return False
    return trained.is_trained and scorer.training_key() == trained.training_key()


def too_few(count: int, least: int = MIN_CALIBRATION) -> ConfigError:
    """What is said of so few calibration images."""
    return ConfigError(
        f"{count} calibration image(s); a threshold needs at least {least}, better 20 or more: raise"
        " data.calibration_fraction, or add normal images; with a handful of them set data.calibration_fraction to 0,"
        " and name changes under augmentation (examples/configs/few_shot.yaml)"
    )
