"""Members of an ensemble that see images through one frozen network: it is called once for all of them.

A backbone on fine levels and one on deep levels are the same network up to the finer one's end, and on a CPU that
network is most of the time. So it is called once, up to the deepest level that any of them wants, and each member's
own projection gets its levels' maps, in the same call: to the bits that it would get alone (on a CPU). Nothing of an
image outlives the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from raydiff.backbone import Backbone, Head
from raydiff.config import ExperimentConfig
from raydiff.contracts import Scores
from raydiff.detector.contract import Detector, finite
from raydiff.detector.tiles import Tiles

__all__ = ["BaselineOnBackbone", "OnBackbone", "Sharing", "sharing"]


@runtime_checkable
class OnBackbone(Protocol):
    """A space or a baseline that sees images through a backbone alone, so that several may see through one."""

    @property
    def backbone(self) -> Backbone:
        """The network, with weights."""
        ...

    def head(self, images: Tensor) -> Head:
        """What makes of the maps of such images, (B, C, H, W), what it sees of them."""
        ...


@runtime_checkable
class BaselineOnBackbone(OnBackbone, Protocol):
    """A baseline whose scores follow from what it sees."""

    def scored(self, seen: Tensor) -> Scores:
        """Scores of images from what the backbone's call with :meth:`head` gave of them."""
        ...


@runtime_checkable
class _Member(Protocol):
    """A detector that has an eye: what it makes of what it sees, apart from seeing."""

    @property
    def config(self) -> ExperimentConfig: ...
    @property
    def device(self) -> str: ...
    @property
    def tiles(self) -> Tiles | None: ...
    @property
    def eye(self) -> OnBackbone | None: ...
    def measured(self, seen: Tensor) -> Tensor: ...
    def scored(self, seen: Tensor) -> Scores: ...
    def joined(self, evidence: Tensor) -> Scores: ...


@dataclass(frozen=True)
class Sharing:
    """Members that take the same images and have the same backbone; ``numbers`` are theirs in the ensemble."""

    numbers: tuple[int, ...]
    members: tuple[_Member, ...]
    backbone: Backbone

    def score(self, images: Tensor) -> list[Scores]:
        """What each member's ``score`` gives of images as they take them, (B, C, H, W)."""
        if (tiles := self.members[0].tiles) is None:
            parts = [member.scored(seen) for member, seen in zip(self.members, self._seen(images), strict=True)]
        else:
            evidence = tiles.evidence_of_each(self._measured, images)
            parts = [member.joined(found) for member, found in zip(self.members, evidence, strict=True)]
        return [finite(part) for part in parts]

    def observe(self, images: Tensor) -> list[Tensor | Scores]:
        """Of each member what calibration needs of images: evidence to judge, or a baseline's scores."""
        if (tiles := self.members[0].tiles) is None:
            found = self._seen(images)
            return [
                finite(member.scored(seen)) if _is_final(member) else member.measured(seen)
                for member, seen in zip(self.members, found, strict=True)
            ]
        evidence = tiles.evidence_of_each(self._measured, images)
        return [
            finite(member.joined(found)) if _is_final(member) else found
            for member, found in zip(self.members, evidence, strict=True)
        ]

    def _measured(self, tiles: Tensor) -> list[Tensor]:
        return [member.measured(seen) for member, seen in zip(self.members, self._seen(tiles), strict=True)]

    def _seen(self, images: Tensor) -> list[Tensor]:
        """What each member sees of images, or of tiles."""
        given = images.detach().to(self.members[0].device)
        eyes = [eye for member in self.members if (eye := member.eye) is not None]
        found = self.backbone.each(given, [(eye.backbone.options.levels, eye.head(given)) for eye in eyes])
        return [seen.to(images.device) for seen in found]


def sharing(members: Sequence[Detector]) -> tuple[Sharing, ...]:
    """The groups of members, two or more each, that can share a backbone's call.

    They take images of one size in one way, whole or in the same tiles, on one device, and their backbones have the
    same name and weights, bit for bit, as far as both go.
    """
    left = [
        (number, member, eye.backbone)
        for number, member in enumerate(members)
        if isinstance(member, _Member) and (eye := member.eye) is not None
    ]
    left.sort(key=lambda found: -found[2].options.levels[-1])  # the deepest first: it covers the others
    groups = []
    while left:
        (_, first, deepest), *_ = left
        group = [found for found in left if _alike(first, found[1]) and deepest.covers(found[2])]
        left = [found for found in left if found not in group]
        if len(group) > 1:
            levels = tuple(sorted({level for found in group for level in found[2].options.levels}))
            group.sort(key=lambda found: found[0])
            numbers, those = tuple(found[0] for found in group), tuple(found[1] for found in group)
            groups.append(Sharing(numbers, those, deepest.with_levels(levels)))
    return tuple(groups)


def _alike(first: _Member, second: _Member) -> bool:
    """Whether images come to both backbones in the same way."""
    return all(
        one == other
        for one, other in (
            (first.config.data.image_size, second.config.data.image_size),
            (first.config.data.channels, second.config.data.channels),
            (first.tiles, second.tiles),
            (first.device, second.device),
        )
    )


def _is_final(member: _Member) -> bool:
    """Whether its scores need no statistics of calibration images."""
    return isinstance(member.eye, BaselineOnBackbone)
