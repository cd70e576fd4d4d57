"""The training loop: plain PyTorch behind :class:`raydiff.runtime.Runtime`.

Nothing random depends on what ran before. The order of the images follows from (seed, epoch); an image's noise, step,
flip, view and crop follow from (seed, epoch, image); dropout from (seed, optimiser step, rank). So a run resumed at
step s does from there what an uninterrupted one does, and one worker and two see the same global batches and noise.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raydiff.artifact import encode_json, encode_tensors, read_folder, write_folder
from raydiff.config import ExperimentConfig, TrainingConfig
from raydiff.core.diffusion import keyed_seed
from raydiff.core.moving import to_device
from raydiff.core.objective import diffusion_loss, loss_weights
from raydiff.detector import NUM_ROTATIONS, DiffusionDetector, noised, schedule_of, tensors_below, trained_steps
from raydiff.distillation import Teacher
from raydiff.errors import ArtifactError, TrainingError
from raydiff.feeding import Feed, Meal
from raydiff.grids import Grids
from raydiff.latents import Latents
from raydiff.overlap import ahead
from raydiff.runtime import Runtime
from raydiff.shards import TrainingBatch
from raydiff.storage import Place
from raydiff.views import Views
from raydiff.weighting import Weights

__all__ = ["HeldOut", "Stream", "TrainingSummary", "learning_rate", "train"]

_logger = logging.getLogger(__name__)

Stream = Callable[[int], Iterator[TrainingBatch]]
"""``stream(start_step)`` gives this rank's share of each global batch from that optimiser step on."""


@dataclass(frozen=True)
class HeldOut:
    """Normal images that are not trained on: ``images`` float32 (n, C, H, W), ``labels`` int64 (n,), ``ids``."""

    images: Tensor
    labels: Tensor
    ids: list[str]


@dataclass(frozen=True)
class TrainingSummary:
    """What a finished run reports: steps done, the last metrics, seconds spent in this process."""

    steps: int
    resumed_from: int
    metrics: Mapping[str, Any]
    seconds: float


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of optimiser step ``step`` (0-based): linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / (training.warmup_steps + 1))
    if training.lr_schedule == "constant":
        return training.learning_rate * warm
    progress = max(0.0, (step - training.warmup_steps) / max(1, training.num_steps - training.warmup_steps))
    return training.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    config: ExperimentConfig,
    stream: Stream,
    held_out: HeldOut,
    runtime: Runtime,
    *,
    num_classes: int,
    provenance: Mapping[str, Any] | None = None,
    space_state: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    weights: Weights | None = None,
    grids: Grids | None = None,
) -> TrainingSummary:
    """Train to ``config.training.num_steps``, from the newest checkpoint if there is one.

    ``space_state`` is that of a fitted space; a space that learns nothing needs none. A checkpoint brings its own.
    With a ``teacher`` the network is its student: it begins with its weights and learns what it makes of the images.
    ``weights`` says what each image counts in the loss; all count 1 by default. With ``grids`` the space's work on the
    images is done once, before, and read in place of ``stream``; a space that is not costly needs none.
    The last checkpoint holds the averaged weights as an artefact; :func:`raydiff.detector.load_detector` reads it.

    Raises:
        TrainingError: the loss or a gradient is not a number; the message says at which step.
        ArtifactError: the checkpoint to resume from is damaged, or belongs to another config or other images.
        StorageError: a checkpoint cannot be written; the one before is still there.
    """
    started = time.monotonic()
    whole = {"num_classes": num_classes, **(provenance or {})}
    loop = _Loop(config, runtime, num_classes, whole, space_state, teacher, weights or Weights())
    loop.begin()
    first, settings = loop.step, config.training
    metrics: dict[str, Any] = {}
    busy, since = 0.0, first  # seconds spent training, and the step they count from
    with closing(loop.meals(stream, grids)) as meals:
        while loop.step < settings.num_steps:
            begun = time.monotonic()
            meal = next(meals)
            loop.optimise(meal)
            last = loop.step == settings.num_steps
            validates = last or loop.step % settings.validate_every == 0
            if validates or loop.step % settings.log_every == 0:
                metrics = loop.metrics()  # waits for the device
                busy += time.monotonic() - begun
                metrics["images_per_second"] = (loop.step - since) * settings.batch_size / busy
                metrics["epoch"] = meal[-1].epoch
                if runtime.world_size != config.execution.num_workers:
                    metrics["workers"] = runtime.world_size  # elastic: some are missing
                if validates:
                    metrics["held_out_loss"] = loop.held_out_loss(held_out)
                runtime.report(metrics)
                busy, since = 0.0, loop.step
            else:
                busy += time.monotonic() - begun
            if last or loop.step % settings.checkpoint_every == 0:
                loop.check_finite()
                runtime.save(loop.step, loop.write)
    if grids is not None:
        grids.finished(runtime)
    return TrainingSummary(loop.step, first, metrics, time.monotonic() - started)


class _Loop:
    """Network, average, optimiser and the step they have reached."""

    def __init__(
        self,
        config: ExperimentConfig,
        runtime: Runtime,
        num_classes: int,
        provenance: Mapping[str, Any],
        space_state: Mapping[str, Tensor] | None,
        teacher: Teacher | None,
        weights: Weights,
    ) -> None:
        self.config, self.runtime, self.provenance, self.teacher = config, runtime, provenance, teacher
        self.weights = weights
        self.schedule = schedule_of(config)
        detector = DiffusionDetector.create(
            config, num_classes=num_classes, device=runtime.device, space_state=space_state
        )
        self.views = Views.of(config, rotates=self.rotates)
        cache_mb = 0 if self.views.endless else config.data.cache_mb
        self.latents = Latents(detector.space, runtime.device, cache_mb * 2**20)
        self.space, self.num_classes = detector.space, detector.model.num_classes
        self.network = (detector.network if teacher is None else teacher.initialised(detector.network)).train()
        if config.training.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        average = get_ema_multi_avg_fn(config.training.ema_decay)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.wrapped = wrapped = runtime.wrap(self.network)
        self.forward = cast(nn.Module, torch.compile(wrapped)) if config.training.compile else wrapped
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=config.training.learning_rate, weight_decay=config.training.weight_decay
        )
        self.step = 0
        self.num_images_before: int | None = None
        self.generator = torch.Generator(runtime.device)
        self.loss = torch.zeros((), device=runtime.device)
        self.grad_norm = torch.zeros((), device=runtime.device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=runtime.device)

    @property
    def rotates(self) -> bool:
        """Whether images are turned, and the denoiser told by how much."""
        return self.config.objective.condition == "rotation" and self.teacher is None

    def meals(self, stream: Stream, grids: Grids | None) -> Generator[list[Meal]]:
        """What each step from the present one on is fed with, made in advance by a thread."""
        if self.step == self.config.training.num_steps:
            return ahead(iter(()))
        if grids is not None and self.space.costly:
            stream = grids.stream(self.space, self.views, self.runtime, step=self.step)
        else:
            self._say_if_forgotten()
        feed = Feed(
            self.config, self.views, self.weights, self.latents, num_classes=self.num_classes,
            device=self.runtime.device,
        )  # fmt: skip
        return ahead(feed.meals(stream(self.step)))

    def _say_if_forgotten(self) -> None:
        """A run that encodes its images in every epoch anew may not know that it need not."""
        num_images, data = int(self.provenance.get("num_train_images") or 0), self.config.data
        if not self.space.costly or self.views.endless or self.runtime.rank:
            return
        needed = math.ceil(4 * math.prod(self.space.shape) * num_images * len(self.views.all) / 2**20)
        repeats = self.config.training.num_steps * self.config.training.batch_size > 2 * num_images
        if needed > data.cache_mb and repeats:
            _logger.warning(
                "what space %s makes of the training images takes %d MB, more than data.cache_mb (%d): most is made"
                " anew each time; set data.grids to run to keep it in files, or raise data.cache_mb",
                self.config.space.name, needed, data.cache_mb,
            )  # fmt: skip

    def optimise(self, meals: Sequence[Meal]) -> None:
        """One optimiser step on this rank's share of the global batch, in one backward pass for each meal."""
        settings = self.config.training
        torch.manual_seed(keyed_seed("dropout", self.config.seed, self.step, self.runtime.rank))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, settings)
        self.optimiser.zero_grad(set_to_none=True)
        self.loss = torch.zeros_like(self.loss)
        for i, meal in enumerate(meals):
            share = meal.size * self.runtime.world_size / settings.batch_size  # workers' gradients are averaged
            with self._no_sync() if i < len(meals) - 1 else nullcontext():
                loss = self._loss(meal) * share
                loss.backward()  # type: ignore[no-untyped-call]
                self.loss += loss.detach()
        self.grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.max_grad_norm)
        finite = torch.isfinite(self.loss) & torch.isfinite(self.grad_norm)
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, self.step)
        if self.runtime.device == "cpu":
            self.check_finite()
        self.optimiser.step()
        self.average.update_parameters(self.network)
        self.step += 1

    def check_finite(self) -> None:
        """Stop if the loss or a gradient was not a number at any step so far.

        Raises:
            TrainingError: it was.
        """
        if (bad := int(self.bad_step)) >= 0:
            raise TrainingError(
                f"the loss or a gradient is not a number at step {bad} (seed {self.config.seed}); lower"
                " training.learning_rate or training.max_grad_norm, or use training.precision=float32"
            )

    def metrics(self) -> dict[str, Any]:
        """The line for this step: loss averaged over the workers, rate, gradient norm."""
        self.check_finite()
        return {
            "step": self.step,
            "loss": float(self.runtime.reduce_mean(self.loss)),
            "learning_rate": learning_rate(self.step - 1, self.config.training),
            "grad_norm": float(self.grad_norm),
        }

    @torch.no_grad()
    def held_out_loss(self, held_out: HeldOut) -> float:
        """Denoising loss of the averaged weights on held-out normals, each at its own fixed step and noise."""
        network = self.average.module.eval()
        rank, world, total = self.runtime.rank, self.runtime.world_size, len(held_out.ids)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, total, 64):
            rows = [i for i in range(start, min(start + 64, total)) if i % world == rank]
            if not rows:
                continue
            turns = [i % NUM_ROTATIONS if self.rotates else 0 for i in rows]
            latents = self.latents.of(held_out.images[rows], [held_out.ids[i] for i in rows], turns=turns)
            keys = [("held-out", self.config.seed, held_out.ids[i]) for i in rows]
            spread = torch.tensor([(i + 0.5) / total for i in rows], dtype=torch.float64)
            steps = trained_steps(self.config)
            t = steps[0] + (spread * len(steps)).long()  # evenly over the steps, so that the loss is comparable
            labels = torch.tensor(turns) if self.rotates else held_out.labels[rows]
            loss = self._denoise(network, latents, t, keys, labels)
            sums += torch.tensor([float(loss.double().sum()), len(rows)], dtype=torch.float64)
        sums = self.runtime.reduce_mean(sums.to(self.runtime.device)).cpu()
        return float(sums[0] / sums[1])

    def write(self, path: Place) -> None:
        """The checkpoint: the averaged weights as an uncalibrated artefact, and the state to resume from."""
        detector = DiffusionDetector(
            config=self.config, provenance=self.provenance, network=self.average.module, space=self.space,
            scorer=cast(Any, None),
        )  # fmt: skip
        state = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        state["average.n_averaged"] = self.average.n_averaged
        for index, values in self.optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        position = {
            "step": self.step, "digest": self.config.digest(), "data_digest": self.whole_data_digest,
            "num_train_images": self.provenance.get("num_train_images"),
        }  # fmt: skip
        extra = {"training.safetensors": encode_tensors(state), "training.json": encode_json(position)}
        write_folder(path, "checkpoint", detector.files() | extra)

    @property
    def whole_data_digest(self) -> str | None:
        """Of all that the shards were written with, those left out now among them: which run this is."""
        digest: str | None = self.provenance.get("left_out", {}).get(
            "whole_data_digest", self.provenance.get("data_digest")
        )
        return digest

    @property
    def left_out(self) -> dict[str, int]:
        """What ``data.on_bad_shard: skip`` took from this run, as metrics; empty where it took nothing.

        Where shards were left out in the middle of a run the epoch under way is shuffled anew, so that some of its
        images, ``repeated_at_most``, are seen again; of balanced classes, whose epochs have another length then, all.
        """
        if not (left := self.provenance.get("left_out")):
            return {}
        counted = {"left_out_shards": len(left["shards"]), "left_out_images": left["num_train_images"]}
        now, before = self.provenance["num_train_images"], self.num_images_before
        if before in (None, now):
            return counted
        done, balanced = self.step * self.config.training.batch_size, self.config.training.balance_classes
        return counted | {"repeated_at_most": now if balanced else min(done % before, now - done % now)}

    def begin(self) -> None:
        """Take over the newest checkpoint, if there is one, and report where that is; raises as :meth:`resume`."""
        with self.runtime.latest() as checkpoint:
            if checkpoint is not None:
                self.resume(checkpoint)
        self.runtime.report({"step": self.step, "resumed": True})
        if left := self.left_out:
            self.runtime.report({"step": self.step, **left})

    def resume(self, path: Path) -> None:
        """Take over a checkpoint's state. The shards that were left out then may be others than now.

        Raises:
            ArtifactError: it is damaged, or belongs to another config or other images.
        """
        folder = read_folder(path)
        if folder.kind != "checkpoint":
            raise ArtifactError(f"{path}: is an artefact, not a checkpoint; resume from the run folder")
        position = folder.json("training.json")
        if position["digest"] not in {
            self.config.override({"data.on_bad_shard": value}).digest() for value in ("error", "skip")
        }:
            raise ArtifactError(
                f"{path}: was written by a run with another config; resume with that run's config.yaml, or start anew"
            )
        if position["data_digest"] != self.whole_data_digest:
            raise ArtifactError(
                f"{path}: was trained on other images than there are now; restore the data set, or start a new run"
            )
        state = folder.tensors("training.safetensors")
        self.network.load_state_dict(tensors_below("network.", state))
        weights = folder.tensors("weights.safetensors")
        self.average.module.load_state_dict(tensors_below("denoiser.", weights))
        if space := tensors_below("space.", weights):  # the one it was trained in, whatever was given
            self.space.load_state(space)
        self.average.n_averaged.copy_(state["average.n_averaged"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors_below("optimiser.", state).items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.step = int(position["step"])
        self.num_images_before = position.get("num_train_images")

    def _loss(self, meal: Meal) -> Tensor:
        """Mean loss of a meal with each image's own noise, step, flip and view, in units of the mean weight."""
        config, views = self.config, meal.views
        if meal.grids is not None:
            latents = meal.grids.received()
        else:
            assert meal.pictures is not None  # noqa: S101
            flips, turns = [view.flip for view in views], [view.turns for view in views]
            latents = self.latents.of(meal.pictures, meal.names, flips=flips, turns=turns)
        autocast = torch.autocast(self.runtime.device.split(":")[0], torch.bfloat16)
        with autocast if config.training.precision == "bfloat16" else nullcontext():
            losses = self._denoise(self.forward, latents, meal.t, [("noise", *key) for key in meal.keys], meal.labels)
            return self.weights.mean(losses, meal.counted, meal.size)

    def _denoise(
        self, network: nn.Module, latents: Tensor, t: Tensor, keys: Sequence[tuple[str | int, ...]], labels: Tensor
    ) -> Tensor:
        """Weighted loss per image, (B,)."""
        device, objective = self.runtime.device, self.config.objective
        noise = torch.empty_like(latents)
        for row, key in zip(noise, keys, strict=True):
            row.normal_(generator=self.generator.manual_seed(keyed_seed(*key)))
        if self.teacher is not None:
            return self.teacher.loss(network, latents, noise)
        x_t, wanted = noised(self.config, self.schedule, latents, t, noise, keys)
        if self.config.training.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        condition = None if self.num_classes is None else to_device(labels, device)
        output = network(x_t, to_device(t, device), condition)
        weights = loss_weights(
            self.schedule, t, objective.prediction_type, objective.loss_weighting, objective.min_snr_gamma
        )
        return diffusion_loss(output, wanted, to_device(weights, device))

    def _no_sync(self) -> AbstractContextManager[Any]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        return no_sync() if no_sync is not None else nullcontext()
