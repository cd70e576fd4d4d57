"""Metrics of the door, and those of all replicas joined to one page in Prometheus' text format.

==============================  =========  ======================================================
raydiff_requests_total          counter    answered requests, by operation and status
raydiff_request_seconds         histogram  from the head of a request to its answer, by operation
raydiff_requests_in_progress    gauge      images that are being scored or wait for it
raydiff_replicas                gauge      replicas that answer
==============================  =========  ======================================================

What :mod:`raydiff.service.metrics` counts has a label ``replica`` more.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from raydiff.distributed.serve_board import Report

__all__ = ["DoorMetrics", "joined"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class DoorMetrics:
    """Counts of one process of the door."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("raydiff_requests", "Requests answered", ["operation", "status"], registry=registry)
        self._seconds = Histogram(
            "raydiff_request_seconds", "Time to answer", ["operation"], buckets=_SECONDS, registry=registry
        )
        self._progress = Gauge("raydiff_requests_in_progress", "Images being scored or waiting", registry=registry)
        self._replicas = Gauge("raydiff_replicas", "Replicas that answer", registry=registry)

    def answered(self, operation: str, status: int, seconds: float) -> None:
        """One more request."""
        self._requests.labels(operation, str(status)).inc()
        self._seconds.labels(operation).observe(seconds)

    def render(self, in_progress: int, reports: Iterable[Report]) -> bytes:
        """Everything, in Prometheus' text format."""
        known = list(reports)
        self._progress.set(in_progress)
        self._replicas.set(len(known))
        return generate_latest(self._registry) + joined(known)


def joined(reports: Iterable[Report]) -> bytes:
    """The metrics of several replicas as one text, each sample with the label ``replica``."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for report in reports:
        family = ""
        for line in report.metrics.decode("utf-8").splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, report.replica))
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return "".join(f"{line}\n" for line in lines).encode()


def _labelled(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
