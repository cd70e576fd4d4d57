"""What every detector is: raw scores, a calibrated threshold, and an artefact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from raydiff.artifact import encode_json, encode_tensors, write_folder
from raydiff.config import ExperimentConfig
from raydiff.contracts import Prediction, Scores
from raydiff.core.calibration import Calibration, Origin, conformal_quantile, fit_threshold
from raydiff.errors import ConfigError, NotCalibratedError, ScoreError, ShapeError
from raydiff.images import ImageSpec
from raydiff.storage import Storage

__all__ = ["Detector", "finite", "with_peaks"]

_FEW_IMAGES = 20
"""So many calibration images are needed for a threshold at a false-positive rate of 5 %."""


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
    def images_per_call(self) -> int:
        """Images that cost little more together than one of them alone; larger batches make no image cheaper."""
        return 16

    @property
    def image_spec(self) -> ImageSpec:
        """How an image file becomes the detector's input."""
        return ImageSpec.of(self.config.data)

    def score(self, images: Tensor) -> Scores:
        """Raw scores of a batch.

        Args:
            images: float32 (B, C, H, W) in [-1, 1], of the config's ``channels`` and ``image_size``.

        With ``tiles.size`` memory beside the images and their maps does not depend on ``image_size``, but for the
        evidence: 4 bytes per map and cell.

        Raises:
            ShapeError: the batch has another shape, type or range.
            ScoreError: a score is NaN or infinite; the message gives its index.
        """
        self._check_images(images)
        return finite(self._score(images))

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

    def reconstruct(self, images: Tensor) -> Tensor | None:
        """What the detector takes the normal version of the images to be, (B, C, H, W); None where it has none.

        Raises:
            ShapeError: as :meth:`score`.
        """
        self._check_images(images)
        return self._reconstruct(images)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its figures must know: a threshold that rests on little, images that were left out."""
        return tuple(self._notes(num_named=3))

    @property
    def notes_for_others(self) -> tuple[str, ...]:
        """:attr:`notes` without the names of images."""
        return tuple(self._notes(num_named=0))

    def _notes(self, num_named: int) -> Iterator[str]:
        if self.calibration is not None and (found := self.calibration.threshold).num_images < _FEW_IMAGES:
            low, high = found.interval
            known = {"trained_on": ", or above, since its network was trained on them",
                     "left_out": ", roughly, since other networks gave its scores"}.get(found.origin, "")  # fmt: skip
            yield (
                f"the threshold rests on {found.num_images} independent normal image(s): whatever the target, its"
                f" false-positive rate may lie anywhere between {low:.2g} and {high:.2g} (95 % interval){known}"
            )
        if suspects := sorted(self.provenance.get("suspects", {})):
            first = ", ".join(suspects[:num_named]) + (" ..." if len(suspects) > num_named else "")
            yield (
                f"{len(suspects)} of the normal images look anomalous and were left out or weighed down"
                f"{f' ({first})' if num_named else ''}; suspects.csv in the run lists them"
            )

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

    def calibrate(self, images: Tensor | Iterable[Tensor], *, data_digest: str | None = None) -> Self:
        """A calibrated copy, from normal images that it was not trained on: (n, C, H, W), or batches of them.

        With ``config.calibration.max_images`` only the first so many are looked at. What :meth:`observe` gives of them
        is held in memory.
        """
        observed = torch.cat([self.observe(batch) for batch in self._calibration_batches(images)])  # the parts are gone
        return self.calibrate_observed(observed, data_digest=data_digest)

    def observe(self, images: Tensor) -> Tensor:  # noqa: ARG002
        """What calibration needs of images, (B, ...): all that costs time. Row i depends on ``images[i]`` alone."""
        raise self._fixed()

    def cross_fitted(self, observed: Tensor, groups: Tensor | None = None) -> Scores:  # noqa: ARG002
        """Scores of observed normals, none with statistics that it or its group helped to fit; maps as peaks.

        Args:
            observed: (N, ...), of :meth:`observe`.
            groups: int64 (N,), which rows are views of one image, numbered from 0; each row its own by default.
        """
        raise self._fixed()

    def calibrate_observed(
        self,
        observed: Tensor,  # noqa: ARG002
        *,
        data_digest: str | None = None,  # noqa: ARG002
        groups: Tensor | None = None,  # noqa: ARG002
        origin: Origin = "set_aside",  # noqa: ARG002
    ) -> Self:
        """:meth:`calibrate` from what :meth:`observe` gave, (N, ...), in order.

        ``groups`` as in :meth:`cross_fitted`: a group counts as one image. ``origin`` says how they stood to training.
        """
        raise self._fixed()

    def _fixed(self) -> ConfigError:
        return ConfigError(f"{self.name} cannot be calibrated in parts; calibrate it with whole images")

    def with_target_fpr(self, target_fpr: float) -> Self:
        """A copy whose threshold answers another false-positive rate, from the same calibration scores."""
        return replace(self, calibration=self._calibrated().at(target_fpr))

    def save(self, path: str | Path | Storage, *, overwrite: bool = False) -> Self:
        """Write the artefact folder, to a path or a URI, whole or not at all; returns a copy that knows its digest.

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

    def _check_images(self, images: Tensor, size: tuple[int, int] | None = None) -> None:
        """See that images are of ``data.image_size``, or another size where one is given."""
        data = self.config.data
        expected = (data.channels, *(size or data.image_size))
        if images.ndim != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.float32:
            raise ShapeError(
                f"images are {images.dtype} {tuple(images.shape)}; this detector takes torch.float32 (B, "
                f"{', '.join(map(str, expected))})"
            )
        if images.numel() and max(-float(images.min()), float(images.max())) > 1.001:
            raise ShapeError(
                f"images span {float(images.min()):.3g} to {float(images.max()):.3g}; they must lie in [-1, 1]"
            )

    def _calibration_batches(self, images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """As many of the images, in order, as ``config.calibration.max_images`` allows; no later batch is asked for."""
        left = self.config.calibration.max_images
        for batch in [images] if isinstance(images, Tensor) else images:
            yield batch[:left]
            if left is not None:
                left -= len(batch)
                if left <= 0:
                    return

    def _make_calibration(
        self, scores: Scores, data_digest: str | None, groups: Tensor | None = None, origin: Origin = "set_aside"
    ) -> Calibration:
        """From normal images' scores; maps may be :func:`with_peaks`'."""
        target = self.config.calibration.target_fpr
        num_images = None if groups is None else int(groups.max()) + 1
        mask_threshold = None
        if scores.map is not None:
            peaks = scores.map.flatten(1).amax(1).double().numpy()
            mask_threshold = conformal_quantile(peaks, target, num_images)[0]
        ordered = scores.image.double().sort().values
        threshold = fit_threshold(ordered, target, num_images=num_images, origin=origin)
        return Calibration(threshold, ordered, mask_threshold, data_digest)


def with_peaks(scores: Scores) -> Scores:
    """Each map cut down to its highest value, (B, 1, 1, 1): all that a calibration keeps of it."""
    return replace(scores, map=None if scores.map is None else scores.map.amax((1, 2, 3), keepdim=True))


def finite(scores: Scores) -> Scores:
    """The scores as they are.

    Raises:
        ScoreError: one is NaN or infinite.
    """
    if bad := _first_not_finite(scores):
        raise ScoreError(f"the score of image {bad - 1} in the batch is not finite; the model may have diverged")
    return scores


def _first_not_finite(scores: Scores) -> int:
    """1 + the index of the first image with a score or map that is not finite; 0 when all are."""
    finite = torch.isfinite(scores.image)
    if scores.map is not None:
        finite &= torch.isfinite(scores.map).flatten(1).all(1)
    return 0 if bool(finite.all()) else 1 + int(np.argmin(finite.numpy()))
