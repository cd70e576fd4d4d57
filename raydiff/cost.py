"""What a detector costs when it is used: milliseconds per image by batch size, and the memory that a call adds.

An image is timed from its uint8 pixels to its verdict: conversion, the feature network where there is one, scoring and
threshold. The device is synchronised before the clock is read. Each batch size is run once to warm up, then at least
once more; the median counts.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raydiff.detector import Detector
from raydiff.errors import ConfigError, DataError
from raydiff.images import to_tensor

__all__ = ["Cost", "measure_cost"]

_SECONDS, _MAX_REPEATS = 0.5, 20
_SAMPLE_S = 0.002
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Cost:
    """Milliseconds per image by batch size, and the memory one call takes at its peak.

    ``peak_memory_mb`` (10^6 bytes) is what a call at the largest batch size adds: on a GPU the peak that torch
    allocated, model included; on a CPU the growth of the process's resident memory over the call, sampled every 2 ms,
    model and input left out. None where the system does not tell.
    """

    ms_per_image: dict[int, float]
    peak_memory_mb: float | None

    @property
    def best_batch_size(self) -> int:
        """The one with the least time per image; the smaller of two equal ones."""
        return min(self.ms_per_image, key=lambda size: (self.ms_per_image[size], size))

    @property
    def ms_per_image_best(self) -> float:
        """At the best batch size."""
        return self.ms_per_image[self.best_batch_size]

    def fields(self) -> dict[str, Any]:
        """The fields of :class:`raydiff.results.Result` that come from here."""
        return {
            "ms_per_image_best": self.ms_per_image_best,
            "best_batch_size": self.best_batch_size,
            "peak_memory_mb": self.peak_memory_mb,
        }


def measure_cost(detector: Detector, images: NDArray[np.uint8], batch_sizes: Sequence[int] = (1, 16)) -> Cost:
    """Time a calibrated detector on real images.

    Args:
        detector: whose ``predict`` is timed.
        images: uint8 (n, H, W, C); sizes above n are measured at n.
        batch_sizes: images per call.

    Raises:
        ConfigError: no batch size, or one below 1.
        DataError: there is no image.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"batch_sizes is {list(batch_sizes)}; give sizes of 1 or more")
    if not len(images):
        raise DataError("there is no image to measure the cost with; the test split is empty")
    sizes = sorted({min(size, len(images)) for size in batch_sizes})
    detector.predict(to_tensor(images[:1]))  # imports and tables of the first call are not the batch's memory
    with _peak_memory(detector) as peak:
        detector.predict(to_tensor(images[: sizes[-1]]))
    return Cost({size: _milliseconds(detector, images[:size]) for size in sizes}, peak[0] if peak else None)


def _milliseconds(detector: Detector, images: NDArray[np.uint8]) -> float:
    """Median per image of repeated calls."""
    taken: list[float] = []
    started = time.perf_counter()
    for repeat in range(_MAX_REPEATS + 1):
        _synchronise(detector)
        begun = time.perf_counter()
        detector.predict(to_tensor(images))
        _synchronise(detector)
        if repeat:  # the first one warms up
            taken.append(time.perf_counter() - begun)
            if time.perf_counter() - started > _SECONDS:
                break
    return 1000 * float(np.median(taken)) / len(images)


def _device(detector: Detector) -> torch.device:
    return torch.device(str(getattr(detector, "device", "cpu")))


def _synchronise(detector: Detector) -> None:
    if _device(detector).type == "cuda":
        torch.cuda.synchronize(_device(detector))


@contextmanager
def _peak_memory(detector: Detector) -> Iterator[list[float]]:
    """A list that holds the peak in MB when the block has ended; empty where it cannot be told."""
    found: list[float] = []
    if _device(detector).type == "cuda":
        _synchronise(detector)
        torch.cuda.reset_peak_memory_stats(_device(detector))
        yield found
        found.append(torch.cuda.max_memory_allocated(_device(detector)) / 1e6)
        return
    if not _STATM.exists():
        yield found
        return
    _trim()
    before = _resident()
    samples = [before]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            samples.append(_resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        samples.append(_resident())
        stop.set()
        thread.join()
    found.append((max(samples) - before) / 1e6)


def _resident() -> int:
    """Bytes of the process that are in memory."""
    return int(_STATM.read_text().split()[1]) * _PAGE_BYTES


def _trim() -> None:
    """Give memory that was freed before back to the system, so that it is counted when it is used again (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
