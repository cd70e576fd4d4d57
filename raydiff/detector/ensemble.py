"""Several detectors as one: each member's score as a deviation from calibration normals, combined.

The members see the same images, each at its own size. What a member's score means is learnt from calibration normals
alone: its mean and deviation for ``mean`` and ``max`` of z-scores, and for ``fisher`` its p-value (Fisher 1932, sum of
-log p), see :mod:`raydiff.core.surprise`.
Maps are combined as z-scores of their pixels; or the map is one member's, where levels or sizes that serve the verdict
blur the place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from raydiff.contracts import Scores
from raydiff.core.surprise import surprise
from raydiff.detector.baseline import BaselineDetector
from raydiff.detector.contract import Detector, with_peaks
from raydiff.detector.diffusion import DiffusionDetector
from raydiff.detector.sharing import Sharing, sharing
from raydiff.errors import ConfigError, NotCalibratedError
from raydiff.images import to_tensor, to_uint8

__all__ = ["Combine", "EnsembleDetector", "member_prefix"]

Combine = Literal["mean", "max", "fisher"]

_T = TypeVar("_T")

_TOGETHER = 64
"""Images whose maps are held at once."""
_LEAST = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class EnsembleDetector(Detector):
    """Members, and what their scores mean.

    ``statistics`` holds, float64: ``scores`` (M, n), each member's of calibration normals, sorted; ``scales`` (M, 2),
    their mean and deviation; ``map_scales`` (M, 2), those of the pixels of its maps, NaN for a member without.
    ``map_from`` is the member whose map is shown as it is, from 0; None for the maps of all, combined.
    """

    members: tuple[Detector, ...]
    combine: Combine = "mean"
    map_from: int | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def create(
        cls, members: Sequence[Detector], combine: Combine, provenance: Mapping[str, Any], map_from: int | None = None
    ) -> Self:
        """Not calibrated; it takes images of the largest of its members' sizes.

        Raises:
            ConfigError: there are fewer than two members, one is no single detector of this machine's, they fit images
                to their sizes in different ways, or there is no member ``map_from``.
        """
        if len(members) < 2:
            raise ConfigError(f"an ensemble of {len(members)} detector(s); give two or more runs")
        if map_from is not None and not 0 <= map_from < len(members):
            raise ConfigError(f"--map-from is {map_from + 1}, of {len(members)} runs; give 1 to {len(members)}")
        for member in members:
            if not isinstance(member, DiffusionDetector | BaselineDetector):
                raise ConfigError(f"{member.name} cannot be in an ensemble; give runs of single detectors")
        largest = max(members, key=lambda member: np.prod(member.config.data.image_size))
        sizes = {member.config.data.image_size for member in members}
        resizes = {member.config.data.resize for member in members}
        if len({_shown(member) for member in members}) > 1:
            raise ConfigError(
                "data.align, aligned_width, channels or the aspect of image_size differs between these runs; members of"
                " an ensemble of aligned parts must see the same part of an image: train them with the same"
            )
        if len(resizes) > 1 or (len(sizes) > 1 and resizes == {"own"}):
            raise ConfigError(
                f"data.resize is {' and '.join(sorted(resizes))} in these runs; an ensemble's members must fit images"
                " alike (and with own at one size): train them with one data.resize"
            )
        channels = max(member.config.data.channels for member in members)
        config = members[0].config.override(
            {"data.image_size": list(largest.config.data.image_size), "data.channels": channels}
            | ({"tiles.size": None} if members[0].config.tiles.size else {})
        )
        return cls(config=config, provenance=provenance, members=tuple(members), combine=combine, map_from=map_from)

    @property
    def name(self) -> str:
        """The members', how they are combined, and whose map it is where it is one member's."""
        shown = "" if self.map_from is None else f", map of {self.map_from + 1}"
        return f"{self.combine} of {' + '.join(member.name for member in self.members)}{shown}"

    @property
    def num_evaluations(self) -> int | None:
        """The members' together; None where none has a network."""
        found = [member.num_evaluations for member in self.members]
        return None if all(count is None for count in found) else sum(count or 0 for count in found)

    @property
    def pretrained(self) -> str | None:
        """The first member's that has any."""
        return next((member.pretrained for member in self.members if member.pretrained), None)

    @property
    def device(self) -> str:
        """Where the members' networks run."""
        return next((member.device for member in self.members if isinstance(member, DiffusionDetector)), "cpu")

    @property
    def images_per_call(self) -> int:
        """The smallest of the members'."""
        return min(member.images_per_call for member in self.members)

    @property
    def model_bytes(self) -> int:
        """Of all members."""
        return sum(member.model_bytes for member in self.members)

    def calibrate(self, images: Tensor | Iterable[Tensor], *, data_digest: str | None = None) -> Self:
        """Members' statistics, what their scores mean, and the threshold, from normals that no member was trained on.

        The threshold's scores are cross-fitted over ``config.calibration.folds``: members' statistics, and what their
        scores mean, without the image's own fold. Evidence of all images is held in memory, and maps of baselines.

        Raises:
            ConfigError: there are fewer than 4 images, or the member whose map is wanted has none.
        """
        seen = [_Seen([], []) for _ in self.members]
        for batch in self._calibration_batches(images):
            self._check_images(batch)
            for kept, found in zip(seen, self._of_each(batch, _observed, Sharing.observe), strict=True):
                kept.add(found)
        observed = [_Observed.of(member, kept) for member, kept in zip(self.members, seen, strict=True)]
        count = len(observed[0])
        if count < _LEAST:
            raise ConfigError(
                f"{count} calibration image(s); an ensemble needs at least {_LEAST} that no member was trained on,"
                " better 20 or more: train its members with a larger data.calibration_fraction"
            )
        folds = min(self.config.calibration.folds, count)
        scores, maps = self._first_pass(observed, folds)
        if self.map_from is not None and bool(maps[:, self.map_from].isnan().any()):
            raise ConfigError(
                f"{self.members[self.map_from].name}, run {self.map_from + 1}, has no map to show; give another run's"
                " number as --map-from, or leave it out"
            )
        held_out = self._second_pass(observed, folds, scores, maps)
        members = tuple(one.calibrated(data_digest) for one in observed)
        calibration = self._make_calibration(held_out, data_digest)
        statistics = _statistics(scores, maps)
        return replace(self, members=members, statistics=statistics, calibration=calibration, artifact_digest=None)

    def files(self) -> dict[str, bytes]:
        """Its own, and each member's with a prefix."""
        files = super().files()
        for number, member in enumerate(self.members):
            files |= {f"{member_prefix(number)}{name}": content for name, content in member.files().items()}
        return files

    def _first_pass(self, found: Sequence[_Observed], folds: int) -> tuple[Tensor, Tensor]:
        """Cross-fitted scores (n, M), and mean and mean square of each image's map (n, M, 2), float64."""
        scores = torch.zeros(len(found[0]), len(found), dtype=torch.float64)
        maps = torch.full((len(found[0]), len(found), 2), torch.nan, dtype=torch.float64)
        for rows, parts in _by_fold(found, folds):
            for number, part in enumerate(parts):
                scores[rows, number] = part.image.double()
                if part.map is not None:
                    pixels = part.map.double().flatten(1)
                    maps[rows, number] = torch.stack([pixels.mean(1), pixels.square().mean(1)], 1)
        return scores, maps

    def _second_pass(self, found: Sequence[_Observed], folds: int, scores: Tensor, maps: Tensor) -> Scores:
        """The ensemble's scores and the peaks of its maps, none with statistics of the image's own fold."""
        rows, parts = list[Tensor](), list[Scores]()
        for inside, members in _by_fold(found, folds):
            outside = torch.ones(len(scores), dtype=torch.bool)
            outside[int(inside[0]) % folds :: folds] = False
            parts.append(with_peaks(self._combined(members, _statistics(scores[outside], maps[outside]))))
            rows.append(inside)
        order = torch.cat(rows).argsort()
        together = Scores.concatenate(parts)
        return Scores(together.image[order], None if together.map is None else together.map[order])

    def _score(self, images: Tensor) -> Scores:
        if not self.statistics:
            raise NotCalibratedError(f"{self.name} does not know what its members' scores mean; call calibrate() first")
        return self.combined(self._of_each(images, lambda member, seen: member.score(seen), Sharing.score))

    def combined(self, parts: Sequence[Scores]) -> Scores:
        """Its scores from those of its members, in their order, of the same images."""
        return self._combined(parts, self.statistics)

    @cached_property
    def _shared(self) -> tuple[Sharing, ...]:
        """The members that have one backbone."""
        return sharing(self.members)

    def _of_each(
        self, images: Tensor, alone: Callable[[Detector, Tensor], _T], together: Callable[[Sharing, Tensor], list[_T]]
    ) -> list[_T]:
        """What ``alone`` gives of each member; of those that share a backbone ``together`` gives it at once."""
        found: dict[int, _T] = {}
        for group in self._shared:
            seen = _seen_by(self.members[group.numbers[0]], images)
            found |= zip(group.numbers, together(group, seen), strict=True)
        for number, member in enumerate(self.members):
            if number not in found:
                found[number] = alone(member, _seen_by(member, images))
        return [found[number] for number in range(len(self.members))]

    def _combined(self, parts: Sequence[Scores], statistics: Mapping[str, Tensor]) -> Scores:
        scales, map_scales = statistics["scales"], statistics["map_scales"]
        columns = []
        for number, part in enumerate(parts):
            values = part.image.double().cpu()
            if self.combine == "fisher":
                columns.append(surprise(values, statistics["scores"][number]))
            else:
                columns.append((values - scales[number, 0]) / scales[number, 1])
        image = _together(torch.stack(columns), self.combine)
        size = self.config.data.image_size
        if self.map_from is not None:
            own = parts[self.map_from].map
            return Scores(image, None if own is None else _enlarged(own.cpu(), size))
        maps = [
            (_enlarged(part.map.cpu(), size).double() - map_scales[number, 0]) / map_scales[number, 1]
            for number, part in enumerate(parts)
            if part.map is not None
        ]
        if not maps:
            return Scores(image)
        return Scores(image, _together(torch.stack(maps), "mean" if self.combine == "fisher" else self.combine).float())

    def _reconstruct(self, images: Tensor) -> Tensor | None:
        """The first member's that has one, at the ensemble's size."""
        for member in self.members:
            rebuilt = member.reconstruct(_seen_by(member, images))
            if rebuilt is not None:
                large = _enlarged(rebuilt.cpu(), self.config.data.image_size)
                return large.expand(-1, self.config.data.channels, -1, -1).contiguous().clamp(-1, 1)
        return None

    def _describe(self) -> dict[str, Any]:
        shown = {} if self.map_from is None else {"map_from": self.map_from}
        return {"kind": "ensemble", "combine": self.combine, "members": len(self.members), **shown}

    def _weights(self) -> dict[str, Tensor]:
        return {}

    def _statistics(self) -> dict[str, Tensor]:
        return dict(self.statistics)


class _Seen(NamedTuple):
    """What members say of calibration images, batch by batch."""

    evidence: list[Tensor]
    scores: list[Scores]

    def add(self, found: Tensor | Scores) -> None:
        if isinstance(found, Tensor):
            self.evidence.append(found)
        else:
            self.scores.append(found)


class _Observed(NamedTuple):
    """A member, and all that it says of calibration images: evidence to judge, or a baseline's final scores."""

    member: Detector
    evidence: Tensor | None
    scores: Scores | None

    @classmethod
    def of(cls, member: Detector, seen: _Seen) -> _Observed:
        if seen.evidence:
            return cls(member, torch.cat(seen.evidence), None)
        return cls(member, None, Scores.concatenate(seen.scores) if seen.scores else Scores(torch.empty(0)))

    def __len__(self) -> int:
        found = self.evidence if self.evidence is not None else None if self.scores is None else self.scores.image
        return 0 if found is None else len(found)

    def fitted(self, outside: Tensor) -> Mapping[str, Tensor]:
        """The scorer's statistics of some images; none for a baseline."""
        if self.evidence is None or not isinstance(self.member, DiffusionDetector):
            return {}
        return self.member.scorer.fit(self.evidence[outside])

    def judged(self, rows: Tensor, statistics: Mapping[str, Tensor]) -> Scores:
        """Scores and maps of some images."""
        if self.evidence is not None and isinstance(self.member, DiffusionDetector):
            return self.member.judged(self.evidence[rows], statistics)
        assert self.scores is not None  # noqa: S101
        return Scores(self.scores.image[rows], None if self.scores.map is None else self.scores.map[rows])

    def calibrated(self, data_digest: str | None) -> Detector:
        """The member with what it learnt of the images as the ensemble shows them."""
        if self.evidence is not None:
            return self.member.calibrate_observed(self.evidence, data_digest=data_digest)
        assert self.scores is not None  # noqa: S101
        peaks = with_peaks(self.scores)
        columns = [peaks.image.double()] + ([] if peaks.map is None else [peaks.map.flatten().double()])
        return self.member.calibrate_observed(torch.stack(columns, 1), data_digest=data_digest)


def _observed(member: Detector, images: Tensor) -> Tensor | Scores:
    """Evidence to judge, or a baseline's final scores."""
    return member.observe(images) if isinstance(member, DiffusionDetector) else member.score(images)


def member_prefix(number: int) -> str:
    """What the names of a member's files begin with."""
    return f"member-{number}."


def _by_fold(found: Sequence[_Observed], folds: int) -> Iterator[tuple[Tensor, list[Scores]]]:
    """Some images of a fold, and what each member, with statistics of the others, makes of them."""
    count = len(found[0])
    for fold in range(folds):
        outside = torch.ones(count, dtype=torch.bool)
        outside[fold::folds] = False
        statistics = [one.fitted(outside) for one in found]
        inside = torch.arange(fold, count, folds)
        for start in range(0, len(inside), _TOGETHER):
            rows = inside[start : start + _TOGETHER]
            yield rows, [one.judged(rows, fitted) for one, fitted in zip(found, statistics, strict=True)]


def _statistics(scores: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """See :class:`EnsembleDetector`; from (n, M) and (n, M, 2)."""
    mean, square = maps.mean(0).unbind(1)
    deviation = (square - mean.square()).clamp(min=1e-24).sqrt()
    spread = scores.std(0, correction=0).clamp(min=1e-12)
    return {
        "scores": scores.sort(0).values.T.contiguous(),
        "scales": torch.stack([scores.mean(0), spread], 1),
        "map_scales": torch.stack([mean, deviation], 1),
    }


def _together(values: Tensor, combine: Combine) -> Tensor:
    """Over the first axis: the mean, the highest, or the sum."""
    if combine == "max":
        return values.amax(0)
    return values.mean(0) if combine == "mean" else values.sum(0)


def _shown(member: Detector) -> tuple[float, ...] | None:
    """What a member sees of an aligned part's surroundings: width, height by width, channels; None: all of an image."""
    spec = member.image_spec
    if spec.aligned_width is None:
        return None
    return spec.aligned_width, spec.image_size[0] / spec.image_size[1], spec.channels


def _seen_by(member: Detector, images: Tensor) -> Tensor:
    """Images of the ensemble's as the member takes them: resized one by one as files are, grey where it wants grey."""
    data = member.config.data
    if tuple(images.shape[1:]) == (data.channels, *data.image_size):
        return images
    height, width = data.image_size
    brought = []
    for pixels in to_uint8(images):
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if data.channels == 1 and picture.mode != "L":
            picture = picture.convert("L")
        if (picture.width, picture.height) != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        brought.append(np.asarray(picture).reshape(height, width, data.channels))
    if not brought:
        return images.new_empty(0, data.channels, height, width)
    return to_tensor(np.stack(brought))


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)
