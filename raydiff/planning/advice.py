"""What to change: the bottleneck's remedies, what does not fit, and what another worker would gain. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from raydiff.planning.machines import GETS_PER_S
from raydiff.planning.model import Plan, make_plan
from raydiff.planning.profile import Line

__all__ = ["advice"]

_WINDOW_IMAGES = 64
"""Images that a reading task should be worth, at least: Ray takes some milliseconds to start one."""

_MANY_READS = 4.0
"""Times the training split is read per epoch from which on it is worth a sentence."""


def advice(plan: Plan) -> list[str]:
    """Sentences, the most urgent first; each names the field or the option."""
    remedies = {
        "compute": _compute, "network": _network, "decode": _decode, "storage": _storage, "checkpoints": _checkpoints,
    }  # fmt: skip
    return [*_does_not_fit(plan), *remedies[plan.bottleneck](plan), *_besides(plan)]


def _does_not_fit(plan: Plan) -> Iterator[str]:
    limit, need = plan.device_bytes, plan.device.total
    if limit is None or need <= limit:
        return
    told = f"DOES NOT FIT: a worker needs {need / 1e9:.1f} GB, the GPU has {limit / 1e9:.0f}"
    room = 0.95 * limit - plan.device.stays
    kept, training = Line.through(plan.profile.saved_bytes), plan.run.config.training
    at_once = next((rows for rows in range(plan.run.rows_at_once, 0, -1) if kept.at(rows) <= room), 0)
    if plan.device.temporary > room:  # AdamW's step alone, which no fewer images make smaller
        yield f"{told}; take a smaller denoiser, or a GPU with more memory"
    elif at_once and (passes := ceil(plan.run.rows / at_once)) * plan.run.workers <= training.batch_size:
        yield f"{told}; set training.accumulation_steps to {passes} or more"
    else:
        narrower = " training.precision=bfloat16," if training.precision == "float32" else ""
        yield f"{told}; take a smaller denoiser,{narrower} or a GPU with more memory"


def _compute(plan: Plan) -> Iterator[str]:
    target, step = plan.target, plan.step
    if target.gpu is not None and step.launch > step.arithmetic + step.memory:
        yield (
            "starting operations takes longer than doing them: more images per worker (training.batch_size, or fewer"
            " workers) cost next to nothing, training.compile=true starts fewer"
        )
        return
    if not target.gpus and target.workers_per_node * target.threads > target.cores:
        yield (
            f"{target.workers_per_node} workers of {target.threads} thread(s) share {target.cores} core(s) of a node:"
            " fewer workers, or nodes with more cores"
        )
    if plan.run.config.training.precision == "float32" and target.gpus:
        yield "training.precision=bfloat16 uses the tensor cores for everything"
    more = _with_workers(plan, 2)
    if more is not None:
        gain = more.images_per_second / plan.images_per_second
        yield f"twice the nodes at the same batch: {more.images_per_second:,.0f} images/s, {gain:.2f} times as many"


def _network(plan: Plan) -> Iterator[str]:
    training = plan.run.config.training
    grown = _with_batch(plan, 4)
    gain = grown.images_per_second / plan.images_per_second
    yield (
        f"summing gradients is waited for {plan.step.exposed * 1000:.1f} ms of each step: more images per worker"
        f" (training.batch_size={4 * training.batch_size}: {gain:.1f} times the images/s), fewer workers, or a faster"
        " link between nodes"
    )


def _decode(plan: Plan) -> Iterator[str]:
    target = plan.target
    work = target.workers_per_node * plan.run.rows * plan.profile.images.decode_seconds
    rest = max(plan.step.compute + plan.step.encode + plan.step.exposed, plan.step.read)
    cores = ceil(work / rest) + (target.workers_per_node if target.gpus else 0)
    yield (
        f"images are decoded too slowly: about {cores} cores per node would keep up, or prepare shards with"
        " data.shard_format=raw (no decoding, more bytes), or store images no larger than data.image_size"
    )


def _storage(plan: Plan) -> Iterator[str]:
    need = plan.network.shards_per_s * plan.step.seconds
    rest = max(plan.step.compute + plan.step.encode + plan.step.exposed, plan.step.decode)
    yield (
        f"reading shards is the limit: {need / rest / 1e6:,.0f} MB/s per node would keep up. Each worker reads every"
        f" row group that holds one of its images, {plan.network.amplification:.0f} times the data in all: fewer and"
        " larger workers, smaller images in the shards, or shards copied to each node's own disk"
    )


def _checkpoints(plan: Plan) -> Iterator[str]:
    training = plan.run.config.training
    yield (
        f"a checkpoint takes {plan.checkpoint_seconds:.1f} s and comes every"
        f" {training.checkpoint_every * plan.step.seconds:.1f} s: raise training.checkpoint_every to"
        f" {ceil(20 * plan.checkpoint_seconds / plan.step.seconds)} (5 % of the time)"
    )


def _besides(plan: Plan) -> Iterator[str]:
    training = plan.run.config.training
    save = plan.checkpoint_seconds / training.checkpoint_every / plan.step.seconds
    if plan.bottleneck != "checkpoints" and save > 0.1:
        yield f"checkpoints add {save:.0%} to each step: raise training.checkpoint_every ({training.checkpoint_every})"
    if plan.network.amplification > _MANY_READS and plan.bottleneck != "storage" and not plan.run.cached:
        yield f"shards are read {plan.network.amplification:.0f} times per epoch over all workers"
    share = plan.run.config.data.shuffle_window // plan.run.workers
    if not plan.run.cached and share < _WINDOW_IMAGES:
        yield (
            f"each worker finds {share} image(s) in a window and starts a task for them:"
            f" data.shuffle_window={_WINDOW_IMAGES * plan.run.workers} or more"
        )
    if plan.network.groups_per_s > GETS_PER_S:
        yield (
            f"all workers read {plan.network.groups_per_s:,.0f} row groups a second: S3 promises"
            f" {GETS_PER_S:,} requests/s for a prefix, so copy the shards to each node's own disk, at one path"
        )
    if plan.run.rows * plan.run.workers > plan.run.config.training.batch_size:
        yield (
            f"training.batch_size {training.batch_size} is no multiple of {plan.run.workers} workers: some wait for"
            " those with an image more"
        )
    if plan.time.calibration > 0.2 * plan.time.total:
        yield (
            f"calibration scores {plan.num_calibrated:,} images one after the other on one device, "
            f"{plan.time.calibration / plan.time.total:.0%} of the time: calibration.max_images takes the first so many"
        )
    if plan.host.calibrating > 0.5 * plan.host.total and plan.run.num_calibrated >= plan.run.num_suspected:
        yield (
            f"calibration holds the maps of {plan.run.num_calibrated:,} images, {plan.host.calibrating / 1e9:.1f} GB"
            " where raydiff fit was started: calibration.max_images takes the first so many"
        )
    if plan.time.startup > 0.5 * plan.time.total:
        yield "more than half of the time is start-up: one worker, or raydiff.experiment.fit_locally, is as quick"


def _with_workers(plan: Plan, times: int) -> Plan | None:
    """The plan on so many times the nodes; None where the batch has too few images for that."""
    workers = plan.run.workers * times
    if plan.run.config.training.batch_size < workers:
        return None
    target = replace(plan.target, nodes=plan.target.nodes * times, workers=workers)
    return make_plan(plan.profile, replace(plan.run, workers=workers), target)


def _with_batch(plan: Plan, times: int) -> Plan:
    config = plan.run.config.override({"training.batch_size": plan.run.config.training.batch_size * times})
    return make_plan(plan.profile, replace(plan.run, config=config), plan.target)
