"""A plan as text: what it will take, what limits it, what to change, and what was assumed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from raydiff.planning.advice import advice
from raydiff.planning.model import Plan
from raydiff.planning.profile import Profile

__all__ = ["duration", "plan_words", "profile_words", "size"]

_INDENT = " " * 17
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def plan_words(plan: Plan) -> str:
    """Some thirty lines for a terminal."""
    sections = [_head(plan), _speed(plan), _time(plan), _memory(plan), _storage(plan), _network(plan), _serving(plan)]
    lines = [line for section in sections for line in section]
    lines += ["", f"Bottleneck: {plan.bottleneck}."]
    lines += [f"- {sentence}" for sentence in advice(plan)]
    lines += ["", "Assumed, not measured:"]
    lines += [f"- {sentence}" for sentence in plan.assumptions]
    return "\n".join(_wrapped(line) for line in lines)


def profile_words(profile: Profile) -> str:
    """A few lines on what was measured."""
    steps = ", ".join(f"{seconds * 1000:.1f} ms with {rows}" for rows, seconds in profile.step_seconds.items())
    images = profile.images
    lines = [
        f"measured in {profile.seconds:.0f} s on {profile.machine}:",
        f"  a step of {steps} image(s); {sum(profile.flops.values()) / 1e9:.3g} GFLOP per image, forward and backward",
        f"  {profile.num_parameters:,} weights; a checkpoint of {size(profile.checkpoint_bytes)} in"
        f" {profile.checkpoint_seconds:.2f} s",
        f"  a score in {profile.score_seconds * 1000:.2f} ms ({profile.evaluations} evaluations); an image decoded in"
        f" {images.decode_seconds * 1000:.2f} ms, {size(images.file_bytes)} ({images.source})",
    ]
    if profile.pair is not None:
        largest = max(profile.pair.all_reduce_seconds)
        lines.append(
            f"  two processes at once: steps {profile.pair.slowdown:.2f} times as long, {size(largest)} summed in"
            f" {profile.pair.all_reduce_seconds[largest] * 1000:.1f} ms (gloo)"
        )
    for rows, peak in profile.device_peak_bytes.items():
        lines.append(f"  at most {size(peak)} of the GPU's memory with {rows} image(s)")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes with a unit of powers of 1000."""
    unit = 0
    while abs(count) >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads well."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def _head(plan: Plan) -> Iterator[str]:
    target, run, training = plan.target, plan.run, plan.run.config.training
    what = f"{target.gpus} x {target.gpu.name if target.gpu else 'GPU as measured'}" if target.gpus else "no GPU"
    yield (
        f"{target.nodes} node(s) with {target.cores} core(s) and {what}: {target.workers} worker(s),"
        f" {run.rows} of {training.batch_size} images each"
    )
    if not target.gpus and target.workers_per_node * target.threads > target.cores:
        yield (
            f"  {target.workers_per_node} workers of {target.threads} thread(s) share the {target.cores} core(s) of a"
            f" node: each computes {plan.step.slowdown:.2f} times as long"
        )
    where = "in every worker's memory" if run.cached else "streamed from shards"
    without = " (training.balance_classes, which makes them longer, is not counted)" if training.balance_classes else ""
    steps = f"{training.num_steps:,} steps are {run.epochs:.3g} epochs{without}"
    yield f"  {run.num_train:,} training images, {where}; {steps}"


def _speed(plan: Plan) -> Iterator[str]:
    step = plan.step
    yield ""
    yield f"Speed          {plan.images_per_second:,.1f} images/s, {step.seconds * 1000:.3g} ms a step, of which"
    made_of = f"compute {step.compute * 1000:.3g}"
    if plan.target.gpu is not None:
        made_of += f" (arithmetic {step.arithmetic * 1000:.3g}, memory {step.memory * 1000:.3g},"
        made_of += f" starts {step.launch * 1000:.3g})"
    made_of += f", of it the teacher {step.teacher * 1000:.3g}" if step.teacher else ""
    made_of += f", frozen network {step.encode * 1000:.3g}" if step.encode else ""
    yield f"{_INDENT}{made_of}, waiting for gradients {step.exposed * 1000:.3g} of {step.all_reduce * 1000:.3g} ms"
    if not plan.run.cached:
        yield f"{_INDENT}beside it: decoding {step.decode * 1000:.3g} ms, reading {step.read * 1000:.3g} ms"


def _time(plan: Plan) -> Iterator[str]:
    time = plan.time
    parts = {
        "steps": time.steps, "checkpoints": time.checkpoints, "start": time.startup, "images": time.images,
        "space": time.space, "validation": time.validation, "head": time.head,
        "calibration": time.calibration,
    }  # fmt: skip
    told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.5)
    yield f"Time to train  {duration(time.total)} ({told})"
    if plan.cost is not None:
        yield f"Cost           {plan.cost:,.2f} USD ({plan.target.nodes} node(s) at {plan.target.price:g} an hour)"


def _memory(plan: Plan) -> Iterator[str]:
    device, host = plan.device, plan.host
    where = "GPU memory" if plan.target.gpus else "Worker memory"
    limit = f" of {size(plan.device_bytes)}" if plan.device_bytes else ""
    yield f"{where:<14} {size(device.total)}{limit} per worker:"
    parts = {
        "weights": device.weights, "gradients": device.gradients, "buckets": device.buckets, "AdamW": device.optimiser,
        "average": device.average, "frozen network": device.space, "activations": device.activations,
        "temporary": device.temporary, "CUDA": device.context, "teacher": device.teacher,
    }  # fmt: skip
    yield f"{_INDENT}{_told(parts)}"
    yield f"Host memory    {size(host.total)} per node:"
    parts = {
        "processes": host.processes, "Ray": host.ray, "images": host.images, "features": host.latents,
        "networks": host.networks, "object store": host.object_store, "fitting the space before": host.fitting,
        "calibrating after": host.calibrating,
    }  # fmt: skip
    yield f"{_INDENT}{_told(parts)}"


def _storage(plan: Plan) -> Iterator[str]:
    stored = plan.storage
    yield (
        f"Storage        {size(stored.total)}: shards {size(stored.shards)}, checkpoints {size(stored.checkpoints)}"
        f" ({size(stored.checkpoint)} each), artefact {size(stored.artifact)}"
    )


def _network(plan: Plan) -> Iterator[str]:
    found = plan.network
    yield (
        f"Network        gradients {size(found.gradients)} per step and worker, {size(found.gradients_per_s)}/s each"
        f" way; checkpoints {size(found.checkpoint_per_s)}/s"
    )
    if plan.run.cached:
        read = f"{size(found.shards_at_start)} per node at the start, {size(found.shards_read)} in all"
    else:
        read = f"{size(found.shards_per_s)}/s per node, {found.amplification:.1f} times the data per epoch in all,"
        read += f" {found.groups_per_s:,.3g} row groups/s"
    yield f"{_INDENT}shards {read}"


def _serving(plan: Plan) -> Iterator[str]:
    yield f"Scoring        {plan.score_seconds * 1000:.3g} ms an image, {1 / plan.score_seconds:,.0f} images/s a worker"
    if plan.replicas is not None:
        yield f"{_INDENT}{plan.replicas:,} replica(s) of raydiff serve for {plan.target.requests_per_s:g} images/s"


def _wrapped(line: str) -> str:
    """No wider than 118, continued below its own text."""
    indent = _INDENT if line.startswith(_INDENT) else "  "
    return textwrap.fill(line, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _told(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
