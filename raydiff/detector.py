"""Detectors: the one thing that everything else scores with, a diffusion model and a baseline alike.

>>> detector = load_detector("runs/digits/artifact")                # doctest: +SKIP
>>> detector.predict(images).pred_label                              # doctest: +SKIP

A detector is immutable and its methods may be called from several threads: ``calibrate`` returns a new one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from raydiff import registry
from raydiff.artifact import Folder, encode_json, encode_tensors, read_folder, write_folder
from raydiff.config import ExperimentConfig, Options, component_options
from raydiff.contracts import Baseline, Prediction, Scorer, Scores, Space
from raydiff.core.calibration import Calibration, conformal_quantile, fit_threshold
from raydiff.core.diffusion import Diffusion, keyed_seed
from raydiff.core.schedule import NoiseSchedule, make_schedule
from raydiff.errors import ArtifactError, ConfigError, NotCalibratedError, ScoreError, ShapeError
from raydiff.images import ImageSpec

__all__ = [
    "NUM_ROTATIONS",
    "BaselineDetector",
    "Detector",
    "DiffusionDetector",
    "build_denoiser",
    "build_space",
    "load_detector",
    "num_conditions",
    "schedule_of",
    "trained_steps",
]

NUM_ROTATIONS = 4
"""Labels of ``objective.condition: rotation``: quarter turns counter-clockwise, 0 for an image as it is."""

_MIN_CALIBRATION = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Detector(ABC):
    """Scores images; higher is more anomalous, and a score depends on the image and the artefact alone.

    ``provenance`` is plain JSON about where the detector comes from: classes, digest of the training data, versions.
    ``artifact_digest`` identifies the folder it was loaded from or saved to last; None before.
    """

    config: ExperimentConfig
    calibration: Calibration | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    artifact_digest: str | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """How tables call it."""

    @property
    @abstractmethod
    def num_evaluations(self) -> int | None:
        """NFE, network evaluations per image; None for a detector without a network."""

    @property
    def image_spec(self) -> ImageSpec:
        """How an image file becomes the detector's input."""
        return ImageSpec.of(self.config.data)

    def score(self, images: Tensor) -> Scores:
        """Raw scores of a batch.

        Args:
            images: float32 (B, C, H, W) in [-1, 1], of the config's ``channels`` and ``image_size``.

        Raises:
            ShapeError: the batch has another shape, type or range.
            ScoreError: a score is NaN or infinite; the message gives its index.
        """
        self._check_images(images)
        scores = self._score(images)
        if bad := _first_not_finite(scores):
            raise ScoreError(f"the score of image {bad - 1} in the batch is not finite; the model may have diverged")
        return scores

    def predict(self, images: Tensor) -> Prediction:
        """Scores, verdicts at the calibrated threshold and p-values (no reconstruction).

        Raises:
            NotCalibratedError: the detector has no threshold.
        """
        calibration = self._calibrated()
        scores = self.score(images)
        mask = None
        if scores.map is not None and calibration.mask_threshold is not None:
            mask = scores.map > calibration.mask_threshold
        return Prediction(
            pred_score=scores.image,
            pred_label=scores.image.double() > calibration.threshold.value,
            p_value=calibration.p_value(scores.image),
            anomaly_map=scores.map,
            pred_mask=mask,
        )

    def explain(self, images: Tensor) -> Prediction:
        """:meth:`predict` with the reconstruction, where the detector has one."""
        return replace(self.predict(images), reconstruction=self._reconstruct(images))

    @property
    def has_gradient(self) -> bool:
        """Whether there is a :meth:`surrogate`."""
        return False

    def surrogate(self, images: Tensor) -> Tensor:  # noqa: ARG002
        """A stand-in for the score through which gradients flow back to the images, for attacks; (B,).

        It rises and falls with the score, but need not equal it: an attack's success is judged on :meth:`score`.

        Raises:
            ConfigError: the detector has no gradient.
        """
        raise ConfigError(f"{self.name} has no gradient, so it cannot be attacked; leave it out of the attacks")

    @abstractmethod
    def calibrate(self, images: Tensor | Iterable[Tensor], *, data_digest: str | None = None) -> Self:
        """A calibrated copy, from normal images that it was not trained on: (n, C, H, W), or batches of them."""

    def with_target_fpr(self, target_fpr: float) -> Self:
        """A copy whose threshold answers another false-positive rate, from the same calibration scores."""
        return replace(self, calibration=self._calibrated().at(target_fpr))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Self:
        """Write the artefact folder, whole or not at all; returns a copy that knows its digest.

        Raises:
            StorageError: the place cannot be written, or exists and ``overwrite`` is not set.
        """
        return replace(self, artifact_digest=write_folder(path, "artifact", self.files(), overwrite=overwrite))

    @property
    def model_bytes(self) -> int:
        """Bytes of the tensors in the artefact."""
        tensors = [*self._weights().values(), *self._statistics().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def files(self) -> dict[str, bytes]:
        """The artefact's files, the manifest aside."""
        files = {
            "config.json": encode_json(
                {"detector": self._describe(), "experiment": self.config.to_dict(), "provenance": dict(self.provenance)}
            ),
            "weights.safetensors": encode_tensors(self._weights()),
        }
        if self.calibration is not None:
            files["calibration.json"] = encode_json(self.calibration.to_dict())
            files["statistics.safetensors"] = encode_tensors(self._statistics())
        return files

    @abstractmethod
    def _score(self, images: Tensor) -> Scores: ...

    @property
    def pretrained(self) -> str | None:
        """The name of pretrained weights it uses; None where everything was learnt from the training images."""
        return None

    def _reconstruct(self, images: Tensor) -> Tensor | None:  # noqa: ARG002
        return None

    @abstractmethod
    def _describe(self) -> dict[str, Any]: ...

    @abstractmethod
    def _weights(self) -> dict[str, Tensor]: ...

    def _statistics(self) -> dict[str, Tensor]:
        return {}

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise NotCalibratedError(
                f"{self.name} has no threshold; call calibrate() with normal images it was not trained on"
            )
        return self.calibration

    def _check_images(self, images: Tensor) -> None:
        data = self.config.data
        expected = (data.channels, *data.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.float32:
            raise ShapeError(
                f"images are {images.dtype} {tuple(images.shape)}; this detector takes torch.float32 (B, "
                f"{', '.join(map(str, expected))})"
            )
        if images.numel() and float(images.abs().max()) > 1.001:
            raise ShapeError(
                f"images span {float(images.min()):.3g} to {float(images.max()):.3g}; they must lie in [-1, 1]"
            )

    def _make_calibration(self, scores: Scores, data_digest: str | None) -> Calibration:
        target = self.config.calibration.target_fpr
        mask_threshold = None
        if scores.map is not None:
            peaks = scores.map.flatten(1).amax(1).double().numpy()
            mask_threshold = conformal_quantile(peaks, target)[0]
        ordered = scores.image.double().sort().values
        return Calibration(fit_threshold(ordered, target), ordered, mask_threshold, data_digest)


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
        if space_state:
            space.load_state(space_state)
        scorer: Scorer = registry.build("scorers", config.scoring)
        _check_scorer(scorer, config, num_classes)  # refuse what cannot be scored before anything is trained
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
        """Network and scorer, as in ``unet/denoising_error``."""
        return f"{self.config.denoiser.name}/{self.config.scoring.name}"

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
        )

    @property
    def pretrained(self) -> str | None:
        """The space's, or the scorer's."""
        return self.space.pretrained or getattr(self.scorer, "pretrained", None)

    @property
    def num_evaluations(self) -> int | None:
        """NFE of the scorer."""
        return self.scorer.num_evaluations(self.model)

    def with_scoring(self, scoring: Options) -> Self:
        """The same network with another scorer; it must be calibrated again."""
        config = self.config.model_copy(update={"scoring": scoring})
        scorer: Scorer = registry.build("scorers", scoring)
        _check_scorer(scorer, config, int(self.provenance["num_classes"]))
        return replace(self, config=config, scorer=scorer, statistics={}, calibration=None, artifact_digest=None)

    def measure(self, images: Tensor) -> Tensor:
        """The scorer's evidence, (B, K, H, W): what costs network evaluations."""
        return self.scorer.measure(self.model, self._encode(images))

    def calibrate(self, images: Tensor | Iterable[Tensor], *, data_digest: str | None = None) -> Self:
        """Statistics from all images; the threshold from scores cross-fitted over ``config.calibration.folds``.

        An image's calibration score comes from statistics of the other folds: scored with statistics that it helped to
        fit it would look more normal than a new image does, and the threshold would be too low.
        The evidence, 4 K H W bytes an image, is held in memory.
        """
        batches = [images] if isinstance(images, Tensor) else images
        evidence = torch.cat([self._measured(batch) for batch in batches])
        if len(evidence) < _MIN_CALIBRATION:
            raise ConfigError(
                f"{len(evidence)} calibration image(s); a threshold needs at least {_MIN_CALIBRATION}, better 20 or"
                " more: raise data.calibration_fraction, or add normal images"
            )
        folds = min(self.config.calibration.folds, len(evidence))
        size = self.config.data.image_size
        parts: dict[int, Scores] = {}
        for rows in _folds(len(evidence), folds):
            rest = torch.ones(len(evidence), dtype=torch.bool)
            rest[rows] = False
            scores = self.scorer.judge(evidence[rows], self.scorer.fit(evidence[rest]), size)
            parts |= {int(row): Scores(scores.image[i : i + 1], None if scores.map is None else scores.map[i : i + 1])
                      for i, row in enumerate(rows)}  # fmt: skip
        held_out = Scores.concatenate([parts[i] for i in range(len(evidence))])
        return replace(
            self,
            statistics=self.scorer.fit(evidence),
            calibration=self._make_calibration(held_out, data_digest),
            artifact_digest=None,
        )

    @property
    def has_gradient(self) -> bool:
        """Whether the scorer has a surrogate."""
        return hasattr(self.scorer, "surrogate")

    def surrogate(self, images: Tensor) -> Tensor:
        """See :meth:`Detector.surrogate`: the scorer's, of evidence measured with gradients."""
        if not self.has_gradient:
            return super().surrogate(images)
        evidence = self.scorer.measure(replace(self.model, differentiable=True), self._encode(images))
        return self.scorer.surrogate(evidence, self.statistics)

    def _measured(self, images: Tensor) -> Tensor:
        self._check_images(images)
        return self.measure(images)

    def _score(self, images: Tensor) -> Scores:
        return self.scorer.judge(self.measure(images), self.statistics, self.config.data.image_size)

    def _reconstruct(self, images: Tensor) -> Tensor | None:
        latents = self.scorer.reconstruct(self.model, self._encode(images))
        return None if latents is None else self.space.decode(latents)

    def _encode(self, images: Tensor) -> Tensor:
        return self.space.encode(images.to(self.device)).to(images.device)

    def _describe(self) -> dict[str, Any]:
        return {"kind": "diffusion"}

    def _weights(self) -> dict[str, Tensor]:
        weights = {f"denoiser.{name}": value for name, value in self.network.state_dict().items()}
        weights |= {f"scorer.{name}": value for name, value in self.scorer.state().items()} if self.scorer else {}
        return weights | {f"space.{name}": value for name, value in self.space.state().items()}

    def _statistics(self) -> dict[str, Tensor]:
        return dict(self.statistics)


@dataclass(frozen=True, eq=False, kw_only=True)
class BaselineDetector(Detector):
    """A classic detector behind the same contract."""

    options: Options
    baseline: Baseline

    @classmethod
    def fit(
        cls, config: ExperimentConfig, options: Options, images: Tensor, *, provenance: Mapping[str, Any] | None = None
    ) -> Self:
        """Fit on normal images, (n, C, H, W)."""
        baseline: Baseline = registry.build("baselines", options, seed=config.seed)
        detector = cls(config=config, provenance=provenance or {}, options=options, baseline=baseline)
        detector._check_images(images)
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

    def calibrate(self, images: Tensor | Iterable[Tensor], *, data_digest: str | None = None) -> Self:
        """The threshold from the scores of normal images that the baseline was not fitted on."""
        batches = [images] if isinstance(images, Tensor) else images
        scores = Scores.concatenate([self.score(batch) for batch in batches])
        return replace(self, calibration=self._make_calibration(scores, data_digest), artifact_digest=None)

    @property
    def has_gradient(self) -> bool:
        """Whether the baseline has a surrogate."""
        return hasattr(self.baseline, "surrogate")

    def surrogate(self, images: Tensor) -> Tensor:
        """See :meth:`Detector.surrogate`: the baseline's, where it has one."""
        surrogate: Callable[[Tensor], Tensor] | None = getattr(self.baseline, "surrogate", None)
        return super().surrogate(images) if surrogate is None else surrogate(images)

    def _score(self, images: Tensor) -> Scores:
        return self.baseline.score(images)

    def _describe(self) -> dict[str, Any]:
        return {"kind": "baseline", "baseline": self.options.model_dump(mode="json")}

    def _weights(self) -> dict[str, Tensor]:
        return self.baseline.state()


def load_detector(path: str | Path, *, device: str = "cpu") -> Detector:
    """Load an artefact, or a checkpoint as an uncalibrated detector, after checking every byte of it.

    Raises:
        ArtifactError: the folder is missing, unfinished, truncated, altered, or of a newer format.
        ConfigError: ``device`` is not there.
    """
    _check_device(device)
    folder = read_folder(path)
    content = folder.json("config.json")
    try:
        config = ExperimentConfig.model_validate(content["experiment"])
        described, provenance = content["detector"], content["provenance"]
        if described["kind"] == "baseline":
            return _load_baseline(folder, config, component_options("baselines", described["baseline"]), provenance)
        return _load_diffusion(folder, config, provenance, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder.path}: does not hold a detector ({' '.join(str(error).split())[:200]})"
        ) from error


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r} and there is no such GPU here; use cpu")


def build_space(config: ExperimentConfig) -> Space:
    """The config's space, not fitted."""
    space: Space = registry.build(
        "spaces", config.space, channels=config.data.channels, image_size=config.data.image_size
    )
    return space


def build_denoiser(config: ExperimentConfig, space: Space, num_classes: int) -> nn.Module:
    """The config's network with weights that follow from its seed, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed("weights", config.seed))
        network: nn.Module = registry.build(
            "denoisers", config.denoiser, channels=space.shape[0], image_size=space.shape[1:],
            num_classes=num_conditions(config, num_classes),
        )  # fmt: skip
    return network


def num_conditions(config: ExperimentConfig, num_classes: int) -> int | None:
    """How many labels the denoiser knows; None for an unconditional one."""
    return {"none": None, "class": num_classes, "rotation": NUM_ROTATIONS}[config.objective.condition]


def trained_steps(config: ExperimentConfig) -> range:
    """The steps that ``objective.step_range`` trains, 0-based."""
    low, high = (round(share * (config.schedule.num_train_timesteps - 1)) for share in config.objective.step_range)
    return range(low, high + 1)


def _check_scorer(scorer: Scorer, config: ExperimentConfig, num_classes: int) -> None:
    """See that the denoiser will know the scorer's steps and conditions.

    Raises:
        ConfigError: it will not.
    """
    steps, trained = scorer.timesteps(schedule_of(config)), trained_steps(config)
    if outside := [t for t in steps if t not in trained]:
        raise ConfigError(
            f"scoring {config.scoring.name} looks at step {outside[0]} of {config.schedule.num_train_timesteps};"
            f" objective.step_range trains {trained[0]} to {trained[-1]} alone: change one of them"
        )
    scorer.check(num_conditions(config, num_classes))


def schedule_of(config: ExperimentConfig) -> NoiseSchedule:
    """The config's noise schedule."""
    fields = config.schedule.model_dump()
    return make_schedule(fields.pop("beta_schedule"), fields.pop("num_train_timesteps"), **fields)


def _load_diffusion(folder: Folder, config: ExperimentConfig, provenance: Mapping[str, Any], device: str) -> Detector:
    detector = DiffusionDetector.create(
        config, num_classes=int(provenance["num_classes"]), provenance=provenance, device=device
    )
    weights = folder.tensors("weights.safetensors")
    detector.network.load_state_dict(tensors_below("denoiser.", weights))
    detector.space.load_state(tensors_below("space.", weights))
    detector.scorer.load_state(tensors_below("scorer.", weights))
    calibration = _load_calibration(folder)
    statistics = folder.tensors("statistics.safetensors") if calibration is not None else {}
    return replace(detector, calibration=calibration, statistics=statistics, artifact_digest=folder.digest)


def _load_baseline(
    folder: Folder, config: ExperimentConfig, options: Options, provenance: Mapping[str, Any]
) -> Detector:
    baseline: Baseline = registry.build("baselines", options, seed=config.seed)
    baseline.load_state(folder.tensors("weights.safetensors"))
    return BaselineDetector(
        config=config, options=options, baseline=baseline, provenance=provenance,
        calibration=_load_calibration(folder), artifact_digest=folder.digest,
    )  # fmt: skip


def _load_calibration(folder: Folder) -> Calibration | None:
    if "calibration.json" not in folder.files:
        return None
    return Calibration.from_dict(folder.json("calibration.json"))


def tensors_below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _folds(count: int, folds: int) -> Iterator[Tensor]:
    """Row indices of each fold; the assignment depends on the position alone."""
    for fold in range(folds):
        yield torch.arange(fold, count, folds)


def _first_not_finite(scores: Scores) -> int:
    """1 + the index of the first image with a score or map that is not finite; 0 when all are."""
    finite = torch.isfinite(scores.image)
    if scores.map is not None:
        finite &= torch.isfinite(scores.map).flatten(1).all(1)
    return 0 if bool(finite.all()) else 1 + int(np.argmin(finite.numpy()))
