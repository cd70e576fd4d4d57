"""The replicas: each holds the artefact, decodes and scores images in batches, and follows the board.

An artefact's folder must be readable at the same path on every machine that a replica may run on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve

from raydiff.distributed.serve_batching import Batcher
from raydiff.distributed.serve_board import Report, Wanted
from raydiff.distributed.serve_loopback import keep_ports_local
from raydiff.distributed.serve_settings import ServeSettings
from raydiff.errors import ArtifactError, RaydiffError
from raydiff.experiment import artifact_of
from raydiff.service import ProblemError, ReceivedImage, ScoredImage, ScoringService
from raydiff.service.artifacts import load_artifact
from raydiff.uri import label_of

__all__ = ["Scorer"]

_log = logging.getLogger("ray.serve")
_ASK_S = 1.0
"""When the board is silent for so long, a replica goes on with what it knows ..."""
_ASK_AGAIN_S = 0.1
"""... and waits no longer than this before a batch, until the board has answered again."""

_T = TypeVar("_T")


class Scorer:
    """One replica; :mod:`raydiff.distributed.serve_app` makes a Serve deployment of it."""

    def __init__(self, settings: dict[str, Any], board: Any) -> None:
        """The artefact is loaded in :meth:`reconfigure`, which Serve calls before the replica counts as ready."""
        keep_ports_local()
        self._settings = ServeSettings.model_validate(settings)
        self._board = board
        self._name = str(serve.get_replica_context().replica_id.unique_id)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._service: ScoringService | None = None
        self._rolling: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._reached = -1
        self._previous_id: str | None = None
        self._broken: str | None = None
        self._ask_s = _ASK_S
        self._last_scored = 0.0

    async def reconfigure(self, config: dict[str, str]) -> None:  # noqa: ARG002
        """Load what is wanted, the first time. (Serve's own commands fail on a configuration that is no dictionary.)

        Raises:
            ArtifactError, NotCalibratedError, ConfigError: it cannot serve.
        """
        if self._service is not None:
            return
        self._wanted: Wanted = await self._board.wanted.remote()
        try:
            self._service = await asyncio.to_thread(self._load, self._wanted)
        except Exception:
            with suppress(Exception):
                await self._board.refuse.remote(self._wanted.version)
            raise
        self._reached = self._wanted.version
        self._batches = Batcher(
            self._score_batch, max_size=self._settings.batch_for(self._service.images_per_call),
            wait_s=self._settings.batch_wait_ms / 1000, before=self._follow,
        )  # fmt: skip
        self._following = asyncio.create_task(self._keep_following())

    async def score(self, data: bytes, explain: bool) -> ScoredImage | ProblemError:
        """What the artefact says about one image, or why it says nothing."""
        loop = asyncio.get_running_loop()
        try:
            received = await loop.run_in_executor(self._decoders, self._live.receive, data)
        except ProblemError as problem:
            return problem
        return await self._batches.submit((received, explain))

    async def score_many(self, files: Sequence[bytes], explain: bool) -> list[ScoredImage | ProblemError]:
        """What :meth:`score` says of each."""
        return await asyncio.gather(*(self.score(data, explain) for data in files))

    async def _score_batch(self, batch: Sequence[tuple[ReceivedImage, bool]]) -> list[ScoredImage | ProblemError]:
        images, explain = [received for received, _ in batch], [wanted for _, wanted in batch]
        answers = await self._work(lambda: self._live.score(images, explain))
        self._last_scored = time.monotonic()
        return answers

    async def model(self) -> dict[str, Any]:
        """What is public about the artefact."""
        await self._follow()
        return await asyncio.to_thread(self._live.model)

    async def threshold(self) -> dict[str, Any]:
        """The threshold in force."""
        await self._follow()
        return await self._work(lambda: self._live.set_target_fpr(self._wanted.target_fpr))

    async def drift(self, scores: dict[str, list[NDArray[np.float64]]]) -> dict[str, Any]:
        """Drift of the scores that all replicas hold, by artefact."""
        await self._follow()
        mine = scores.get(self._live.artifact_id) or [np.empty(0)]
        return (await asyncio.to_thread(self._live.drift, np.concatenate(mine))).to_dict()

    async def try_artifact(self, folder: str) -> str | RaydiffError:
        """Load and warm up an artefact without serving it: its id, or why it cannot be served. One at a time."""
        settings = self._settings

        def load() -> str:
            loaded = load_artifact(
                folder, device=settings.device, max_batch=settings.largest_batch, compile=settings.compile
            )
            return loaded.artifact_id

        try:
            return await asyncio.get_running_loop().run_in_executor(self._loader, load)
        except RaydiffError as error:
            return error
        except (OSError, RuntimeError, MemoryError) as error:  # too long a name, or too little memory on a GPU
            _log.error("an artefact cannot be loaded", exc_info=error)
            return ArtifactError(
                f"{label_of(str(folder))}: cannot be loaded ({type(error).__name__}); the replica's log says why"
            )

    async def check_health(self) -> None:
        """Raises when the detector no longer scores as it did at the start, or could not follow a roll."""
        if self._service is None:
            return
        if self._broken is not None:
            raise ArtifactError(self._broken)
        if time.monotonic() - self._last_scored < 5.0:
            return
        await self._work(self._live.check)

    @property
    def _live(self) -> ScoringService:
        assert self._service is not None  # noqa: S101
        return self._service

    def _load(self, wanted: Wanted) -> ScoringService:
        settings = self._settings
        service = ScoringService(
            artifact_of(wanted.folder),
            device=settings.device,
            max_batch=settings.largest_batch,
            limits=settings.limits,
            compile=settings.compile,
        )
        if service.artifact_id != wanted.artifact_id:
            raise ArtifactError(f"{label_of(wanted.folder)}: is another artefact than was rolled to; roll to it again")
        service.set_target_fpr(wanted.target_fpr)
        if settings.shadow is not None:
            service.set_shadow(artifact_of(settings.shadow), settings.shadow_share)
        return service

    async def _work(self, job: Callable[[], _T]) -> _T:
        """In the one thread that scores."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, job)

    async def _keep_following(self) -> None:
        while True:
            with suppress(Exception):
                artifact_id, scores = self._live.drift_scores()
                await self._follow(Report(self._name, artifact_id, self._live.metrics(), scores))
            await asyncio.sleep(1.0)

    async def _follow(self, report: Report | None = None) -> None:
        """Ask the board, and do what it says. The report, which no batch waits for, is given more time."""
        try:
            wanted: Wanted = await asyncio.wait_for(
                self._board.follow.remote(self._name, self._wanted, self._reached, report),
                _ASK_S if report is not None else self._ask_s,
            )
        except Exception as error:
            if self._ask_s == _ASK_S:
                _log.warning("the board does not answer (%s: %s); going on as before", type(error).__name__, error)
            self._ask_s = _ASK_AGAIN_S
            return
        self._ask_s = _ASK_S
        if wanted.version > self._wanted.version or wanted.epoch != self._wanted.epoch:
            rate_changed = wanted.target_fpr != self._wanted.target_fpr
            self._wanted = wanted
            if rate_changed:
                await self._work(lambda: self._live.set_target_fpr(wanted.target_fpr))
        while self._live.artifact_id != self._wanted.artifact_id and self._broken is None:
            if self._rolling is None:
                self._rolling = asyncio.create_task(self._roll(self._wanted), context=Context())  # no request's
            if not self._wanted.settled:
                return
            await asyncio.shield(self._rolling)
        if self._live.artifact_id == self._wanted.artifact_id:  # perhaps once more, after a roll that was given up
            self._broken = None
            self._reached = self._wanted.version

    async def _roll(self, wanted: Wanted) -> None:
        before = self._live.artifact_id
        try:
            if wanted.artifact_id == self._previous_id:
                await asyncio.to_thread(self._live.roll_back)
            else:
                await asyncio.to_thread(self._live.roll, artifact_of(wanted.folder))
            if self._live.artifact_id != wanted.artifact_id:
                raise ArtifactError("the folder holds another artefact than was rolled to")
            self._previous_id = before
        except Exception as error:  # also one of the device's: trying it again for ever would help nobody
            self._broken = f"cannot follow a roll: {error}"
            _log.error("cannot follow a roll", exc_info=error)
            with suppress(Exception):
                await self._board.refuse.remote(wanted.version)
        finally:
            self._rolling = None
