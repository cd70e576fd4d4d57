"""``ScoringService``: images in, verdicts out, with their reasons; plain Python, from any thread, no web framework.

    service = ScoringService("runs/screw/artifact")
    received = service.receive(body)                    # ProblemError: what to answer instead
    answer = service.score([received], explain=True)[0]

A score depends on the image and the artefact alone: it is ``raydiff score``'s bit for bit, in any batch, thread and
order. See :mod:`raydiff.core.chunks`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raydiff.contracts import Prediction
from raydiff.errors import ConfigError, ScoreError
from raydiff.images import ImageSpec, images_per_batch, to_tensor, to_uint8
from raydiff.service.artifacts import LoadedArtifact, describe, load_artifact, probe
from raydiff.service.decoding import Limits, ReceivedImage, quiet_decoders, receive
from raydiff.service.drift import Drift, measure_drift
from raydiff.service.explaining import Box, HeatScale, Pictures, draw, find_boxes
from raydiff.service.metrics import ServiceMetrics
from raydiff.service.problems import ProblemError
from raydiff.service.roll import Roll

__all__ = ["Explanation", "ScoredImage", "ScoringService"]


@dataclass(frozen=True)
class Explanation:
    """Where the image is anomalous. ``num_regions`` may exceed the boxes given; without maps there are none."""

    boxes: tuple[Box, ...]
    num_regions: int
    heat_scale: HeatScale | None
    pictures: Pictures


@dataclass(frozen=True)
class ScoredImage:
    """What the artefact ``artifact_id`` says about one image.

    ``timing_ms`` has ``decode``, ``score`` (of the whole batch of ``batch_size`` images) and, where it was asked for,
    ``explain`` (reconstructing all explained images of the batch, and drawing this one's pictures).
    ``height`` and ``width`` are the upright original's, ``image`` the SHA-256 of its bytes.
    """

    score: float
    p_value: float
    threshold: float
    target_fpr: float
    verdict: Literal["normal", "anomalous"]
    artifact_id: str
    image: str
    format: str
    height: int
    width: int
    batch_size: int
    timing_ms: dict[str, float]
    explanation: Explanation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; pictures are PNG files in base64, None where the detector has no such thing."""
        plain = asdict(self)
        if self.explanation is not None:
            for name, picture in vars(self.explanation.pictures).items():
                encoded = None if picture is None else base64.b64encode(picture).decode("ascii")
                plain["explanation"]["pictures"][name] = encoded
            plain["explanation"]["boxes"] = list(plain["explanation"]["boxes"])
        return plain


class ScoringService:
    """An artefact ready to score, which can be exchanged for another while it does."""

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        max_batch: int = 32,
        limits: Limits | None = None,
        drift_window: int = 1000,
        min_drift_scores: int = 100,
        compile: bool = False,  # noqa: A002
    ) -> None:
        """Load and warm up the artefact in ``folder`` (or in a run's folder).

        Args:
            folder: of the artefact that goes live.
            device: ``cpu`` or ``cuda``.
            max_batch: the detector gets at most so many images at once, and fewer where they are large.
            limits: what an image may cost.
            drift_window: live scores that are held against the calibration's.
            min_drift_scores: below, nothing is said about drift.
            compile: the networks of every artefact that goes live, see :func:`raydiff.compiling.compiled`.

        Raises:
            ArtifactError, NotCalibratedError, ConfigError: it cannot serve; names the folder and the remedy.
        """
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}; it must be at least 1")
        quiet_decoders()
        self.max_batch = max_batch
        self.limits = limits or Limits()
        self._metrics = ServiceMetrics()

        def load(place: str | Path) -> LoadedArtifact:
            return load_artifact(
                place,
                device=device,
                max_batch=max_batch,
                window=drift_window,
                min_scores=min_drift_scores,
                compile=compile,
            )

        self._roll = Roll(folder, load, self.limits)

    @property
    def artifact_id(self) -> str:
        """The live artefact's digest."""
        return self._roll.lineup.live.artifact_id

    @property
    def images_per_call(self) -> int:
        """See :attr:`raydiff.detector.Detector.images_per_call`."""
        return self._roll.lineup.live.detector.images_per_call

    @property
    def image_spec(self) -> ImageSpec:
        """What the live artefact takes; for :func:`raydiff.service.receive` in another process."""
        return self._roll.lineup.live.detector.image_spec

    def receive(self, data: bytes) -> ReceivedImage:
        """Check and decode one image for the live artefact.

        Raises:
            ProblemError: it is refused.
        """
        try:
            received = receive(data, self.image_spec, self.limits)
        except ProblemError as problem:
            self._metrics.problem(problem.type)
            raise
        self._metrics.stage("decode", received.decode_ms)
        return received

    def score(
        self, images: Sequence[ReceivedImage], explain: bool | Sequence[bool] = False
    ) -> list[ScoredImage | ProblemError]:
        """One answer per image, in order, all by the artefact that is live now.

        An image that has no score gets its problem, returned and not raised; its neighbours are scored.

        Args:
            images: any number; decoded again where they were for an artefact that takes another size.
            explain: with pictures and boxes, for all or for each.
        """
        flags = [explain] * len(images) if isinstance(explain, bool) else list(explain)
        if len(flags) != len(images):
            raise ConfigError(f"explain has {len(flags)} values for {len(images)} images; give one for each")
        lineup = self._roll.lineup
        answers: list[ScoredImage | ProblemError] = []
        size = min(self.max_batch, images_per_batch(lineup.live.detector.config))
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            answers += self._score_part(lineup.live, images[part], flags[part])
        for received, answer in zip(images, answers, strict=True):
            if isinstance(answer, ProblemError):
                self._metrics.problem(answer.type)
                continue
            self._metrics.scored(answer.artifact_id, answer.verdict, answer.p_value)
            lineup.live.drift.add(answer.score)
            if lineup.shadow is not None:
                lineup.shadow.offer(received, _for_the_record(answer))
        return answers

    def model(self) -> dict[str, Any]:
        """The live artefact, what is before and beside it, and the limits, as JSON."""
        lineup = self._roll.lineup
        return {
            **describe(lineup.live),
            "previous_artifact_id": None if lineup.previous is None else lineup.previous.artifact_id,
            "shadow": None if lineup.shadow is None else lineup.shadow.report(),
            "limits": asdict(self.limits) | {"max_pixels": self.limits.pixels(lineup.live.detector.image_spec)},
            "max_batch": self.max_batch,
        }

    def set_target_fpr(self, target_fpr: float | None) -> dict[str, Any]:
        """The threshold for another false-positive rate, from the next call on; returns it with its rule, as JSON.

        It stays in force when artefacts are rolled; None goes back to the rate that each was saved with.

        Raises:
            ProblemError: the rate is no number between 0 and 1.
        """
        try:
            threshold = self._roll.set_target_fpr(target_fpr).calibration.threshold
        except ProblemError as problem:
            self._metrics.problem(problem.type)
            raise
        return threshold.to_dict() | {"rule": threshold.rule}

    def roll(self, folder: str | Path) -> str:
        """Load another artefact and make it live; its id. See :meth:`raydiff.service.roll.Roll.roll`."""
        return self._roll.roll(folder).artifact_id

    def roll_back(self) -> str:
        """Make the previous artefact live again; its id. See :meth:`raydiff.service.roll.Roll.roll_back`."""
        return self._roll.roll_back().artifact_id

    def set_shadow(self, folder: str | Path | None, share: float = 0.1) -> None:
        """Have another artefact score a share of the images for the record; None ends it.

        See :meth:`raydiff.service.roll.Roll.set_shadow`.
        """
        self._roll.set_shadow(folder, share)

    def shadow_report(self, *, wait: bool = False) -> dict[str, Any] | None:
        """How the shadow compares, as JSON; None without one. ``wait`` for what is being scored."""
        shadow = self._roll.lineup.shadow
        if shadow is None:
            return None
        if wait:
            shadow.wait()
        return shadow.report()

    def check(self) -> None:
        """Score a stored image, counted nowhere: the score must be the one it had when the artefact was loaded.

        Raises:
            RaydiffError: it is not, or there is none; memory or the device has spoilt the detector.
        """
        live = self._roll.lineup.live
        found = probe(live.detector)
        if found != live.probe_score:
            raise ScoreError(f"a stored image scored {live.probe_score} and now {found}; start the process again")

    def drift(self, scores: NDArray[np.float64] | None = None) -> Drift:
        """These scores, (n,), or else the live artefact's last ones here, against its calibration.

        Given are those of several replicas, joined (:meth:`drift_scores`).
        """
        live = self._roll.lineup.live
        given = live.drift.scores() if scores is None else scores
        return measure_drift(given, live.calibration, min_scores=live.drift.min_scores)

    def drift_scores(self) -> tuple[str, NDArray[np.float64]]:
        """The live artefact's id and its scores in the window, oldest first."""
        live = self._roll.lineup.live
        return live.artifact_id, live.drift.scores()

    def metrics(self) -> bytes:
        """Prometheus' text format; its content type is :data:`raydiff.service.metrics.CONTENT_TYPE`."""
        lineup = self._roll.lineup
        shadow = None if lineup.shadow is None else lineup.shadow.report()
        return self._metrics.render(lineup.live, lineup.live.drift.measure(lineup.live.calibration), shadow)

    def close(self) -> None:
        """End the shadow's thread; scoring goes on to work."""
        self._roll.set_shadow(None)

    def _score_part(
        self, live: LoadedArtifact, images: Sequence[ReceivedImage], flags: Sequence[bool]
    ) -> list[ScoredImage | ProblemError]:
        answers: list[ScoredImage | ProblemError | None] = [None] * len(images)
        fitting: list[tuple[int, ReceivedImage]] = []
        for i, received in enumerate(images):
            try:
                fitting.append((i, self._fitted(received, live)))
            except ProblemError as problem:
                answers[i] = problem
        batch = self._scored(live, [received for _, received in fitting], [flags[i] for i, _ in fitting])
        for (i, _), answer in zip(fitting, batch, strict=True):
            answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _fitted(self, received: ReceivedImage, live: LoadedArtifact) -> ReceivedImage:
        spec = live.detector.image_spec
        return received if received.spec == spec else receive(received.data, spec, self.limits)

    def _scored(
        self, live: LoadedArtifact, images: Sequence[ReceivedImage], flags: Sequence[bool]
    ) -> list[ScoredImage | ProblemError]:
        """One call of the detector; when an image has no finite score, one call for each."""
        if not images:
            return []
        started = time.perf_counter()
        tensor = to_tensor(np.stack([received.image.pixels for received in images]))
        try:
            prediction = live.detector.predict(tensor)
        except ScoreError:
            if len(images) > 1:
                return [self._scored(live, [image], [flag])[0] for image, flag in zip(images, flags, strict=True)]
            return [ProblemError("score-not-finite", "The detector has no finite score for this image; send another.")]
        score_ms = 1000 * (time.perf_counter() - started)
        self._metrics.stage("score", score_ms)
        self._metrics.batch(len(images))
        explained = self._explained(live, images, flags, tensor, prediction)
        return [
            _answer(live, images[i], prediction, i, len(images), score_ms, explained[i]) for i in range(len(images))
        ]

    def _explained(
        self,
        live: LoadedArtifact,
        images: Sequence[ReceivedImage],
        flags: Sequence[bool],
        tensor: Any,
        prediction: Prediction,
    ) -> list[tuple[Explanation, float] | None]:
        """An explanation with its milliseconds where it was asked for; the reconstruction is made for all at once."""
        wanted = [i for i, flag in enumerate(flags) if flag]
        found: list[tuple[Explanation, float] | None] = [None] * len(images)
        if not wanted:
            return found
        started = time.perf_counter()
        rebuilt = live.detector.reconstruct(tensor[wanted]) if live.has_reconstruction else None
        pixels = None if rebuilt is None else to_uint8(rebuilt)
        common_ms = 1000 * (time.perf_counter() - started)
        for row, i in enumerate(wanted):
            started = time.perf_counter()
            explanation = _explain(live, images[i], prediction, i, None if pixels is None else pixels[row])
            taken = common_ms + 1000 * (time.perf_counter() - started)
            self._metrics.stage("explain", taken)
            found[i] = (explanation, taken)
        return found


def _explain(
    live: LoadedArtifact, received: ReceivedImage, prediction: Prediction, i: int, reconstruction: Any
) -> Explanation:
    values = None if prediction.anomaly_map is None else prediction.anomaly_map[i, 0].cpu().numpy()
    boxes: list[Box] = []
    count = 0
    if values is not None and prediction.pred_mask is not None:
        mask = prediction.pred_mask[i, 0].cpu().numpy()
        boxes, count = find_boxes(values, mask, received.image.placement)
    return Explanation(tuple(boxes), count, live.scale, draw(received, values, live.scale, reconstruction))


def _answer(
    live: LoadedArtifact,
    received: ReceivedImage,
    prediction: Prediction,
    i: int,
    batch_size: int,
    score_ms: float,
    explained: tuple[Explanation, float] | None,
) -> ScoredImage:
    threshold = live.calibration.threshold
    timing = {"decode": received.decode_ms, "score": score_ms}
    if explained is not None:
        timing["explain"] = explained[1]
    return ScoredImage(
        score=float(prediction.pred_score[i].double()),
        p_value=float(prediction.p_value[i]),
        threshold=threshold.value,
        target_fpr=threshold.target_fpr,
        verdict="anomalous" if bool(prediction.pred_label[i]) else "normal",
        artifact_id=live.artifact_id,
        image=received.digest,
        format=received.image.format,
        height=received.image.size[0],
        width=received.image.size[1],
        batch_size=batch_size,
        timing_ms=timing,
        explanation=None if explained is None else explained[0],
    )


def _for_the_record(answer: ScoredImage) -> dict[str, Any]:
    return {
        "live_artifact_id": answer.artifact_id,
        "live_score": answer.score,
        "live_p_value": answer.p_value,
        "live_is_anomaly": answer.verdict == "anomalous",
    }
