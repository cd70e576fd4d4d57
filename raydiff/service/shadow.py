"""An artefact that scores a share of the images beside the live one and is only recorded.

Which images is decided by their bytes, so the same image is always or never among them, on every replica. The work is
done by a thread of its own after the answer was made; when it cannot keep up, images are left out and counted, and
nothing that goes wrong here reaches an answer.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from queue import Empty, Full, Queue
from threading import Lock, Thread
from typing import Any

import numpy as np

from raydiff.errors import ConfigError
from raydiff.images import to_tensor
from raydiff.service.artifacts import LoadedArtifact
from raydiff.service.decoding import Limits, ReceivedImage, receive

__all__ = ["Shadow", "ShadowRecord"]

_log = logging.getLogger(__name__)

_AT_ONCE = 16
_MAX_PENDING_BYTES = 64_000_000


@dataclass(frozen=True)
class ShadowRecord:
    """One image under both artefacts; ``image`` is the SHA-256 of its bytes."""

    image: str
    live_artifact_id: str
    live_score: float
    live_p_value: float
    live_is_anomaly: bool
    score: float
    p_value: float
    is_anomaly: bool


@dataclass(frozen=True, eq=False)
class _Job:
    received: ReceivedImage
    live: Mapping[str, Any]


class Shadow:
    """Takes images, scores them when it can, and tells how it compares with the live artefact."""

    def __init__(
        self,
        artifact: LoadedArtifact,
        share: float,
        *,
        limits: Limits | None = None,
        max_pending: int = 64,
        max_records: int = 1000,
    ) -> None:
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"the shadow's share is {share}; it must be above 0 and at most 1")
        self.artifact = artifact
        self.share = share
        self._limits = limits
        self._lock = Lock()
        self._records: deque[ShadowRecord] = deque(maxlen=max_records)
        self._counts = dict.fromkeys(("num_scored", "num_agreeing", "num_failed", "num_left_out"), 0)
        self._difference, self._distance = 0.0, 0.0
        self._queue: Queue[_Job | None] = Queue(max_pending)
        self._pending_bytes = 0
        self._closed = False
        self._failures = set[type[Exception]]()
        self._thread = Thread(target=self._work, name="raydiff-shadow", daemon=True)
        self._thread.start()

    def takes(self, digest: str) -> bool:
        """Whether an image of this SHA-256 (hex) is among the share."""
        return int(digest[:16], 16) < self.share * 2**64

    def offer(self, received: ReceivedImage, live: Mapping[str, Any]) -> None:
        """Score the image some time, if it is among the share; never waits.

        Args:
            received: the image.
            live: what the live artefact said: ``live_artifact_id``, ``live_score``, ``live_p_value``,
                ``live_is_anomaly``.
        """
        if not self.takes(received.digest):
            return
        if received.spec == self.artifact.detector.image_spec:
            received = replace(received, data=b"")  # which a decoding at another size would need
        size = len(received.data)
        with self._lock:
            if self._closed:
                return
            if self._pending_bytes + size > _MAX_PENDING_BYTES:
                self._counts["num_left_out"] += 1
                return
            try:
                self._queue.put_nowait(_Job(received, live))
                self._pending_bytes += size
            except Full:
                self._counts["num_left_out"] += 1

    def wait(self) -> None:
        """Until all that was offered so far is recorded."""
        self._queue.join()

    def close(self) -> None:
        """Take no more, leave out what waits, and end the thread."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._queue.put(None)
        self._thread.join()

    def records(self) -> list[ShadowRecord]:
        """The last ones, oldest first."""
        with self._lock:
            return list(self._records)

    def report(self) -> dict[str, Any]:
        """How often the verdicts agree, and the mean (absolute) difference of p-values, shadow minus live, as JSON."""
        with self._lock:
            count = self._counts["num_scored"]
            return {
                "artifact_id": self.artifact.artifact_id,
                "share": self.share,
                **self._counts,
                "agreement": self._counts["num_agreeing"] / count if count else None,
                "mean_p_value_difference": self._difference / count if count else None,
                "mean_absolute_p_value_difference": self._distance / count if count else None,
                "last": asdict(self._records[-1]) if self._records else None,
            }

    def _work(self) -> None:
        going = True
        while going:
            taken = [self._queue.get()]
            while len(taken) < _AT_ONCE:
                try:
                    taken.append(self._queue.get_nowait())
                except Empty:
                    break
            jobs = [job for job in taken if job is not None]
            going = len(jobs) == len(taken)
            try:
                for job in jobs:
                    self._score(job)
                    with self._lock:
                        self._pending_bytes -= len(job.received.data)
            finally:
                for _ in taken:
                    self._queue.task_done()

    def _score(self, job: _Job) -> None:
        if self._closed:
            with self._lock:
                self._counts["num_left_out"] += 1
            return
        try:
            record = self._compare(job)
        except Exception as error:  # whatever it is, the thread must go on
            with self._lock:
                self._counts["num_failed"] += 1
                first = type(error) not in self._failures
                self._failures.add(type(error))
            if first:
                _log.exception("the candidate %s cannot score an image", self.artifact.artifact_id)
            return
        self.artifact.drift.add(record.score)
        with self._lock:
            self._records.append(record)
            self._counts["num_scored"] += 1
            self._counts["num_agreeing"] += record.is_anomaly == record.live_is_anomaly
            difference = record.p_value - record.live_p_value
            self._difference += difference
            self._distance += abs(difference)

    def _compare(self, job: _Job) -> ShadowRecord:
        detector = self.artifact.detector
        received = job.received
        if received.spec != detector.image_spec:
            received = receive(received.data, detector.image_spec, self._limits)
        prediction = detector.predict(to_tensor(np.ascontiguousarray(received.image.pixels)[None]))
        return ShadowRecord(
            image=received.digest,
            score=float(prediction.pred_score[0]),
            p_value=float(prediction.p_value[0]),
            is_anomaly=bool(prediction.pred_label[0]),
            **job.live,
        )
