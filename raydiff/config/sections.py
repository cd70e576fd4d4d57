"""The sections of a config, each a frozen group of fields with a sentence for what does not speak for itself."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raydiff.config.options import NO_EFFECT, WHERE_SET, DatasetOptions, Section, component_options

__all__ = [
    "AugmentationConfig",
    "CalibrationConfig",
    "ContaminationConfig",
    "CrossFittingConfig",
    "DataConfig",
    "DistillationConfig",
    "ExecutionConfig",
    "ObjectiveConfig",
    "ScheduleConfig",
    "TilesConfig",
    "TrainingConfig",
]


class DataConfig(Section):
    """Which images, in which size, and how they are split."""

    dataset: DatasetOptions = Field(
        default_factory=partial(component_options, "datasets", "digits"), description="the data set and its own options"
    )
    image_size: tuple[int, int] = Field((8, 8), description="height and width in pixels that the detector works at")
    channels: Literal[1, 3] = Field(1, description="1 (grey) or 3 (RGB)")
    resize: Literal["stretch", "pad", "own", "strict"] = Field(
        "stretch",
        description="how an image of another size is fitted; pad: scaled, and its edges repeated around it; own: as"
        " pad, but never enlarged, so that images of many sizes keep their own resolution; strict refuses it",
    )
    align: Literal["none", "principal_axis"] = Field(
        "none",
        description="principal_axis: the part that stands out of the background is turned level, its heavier end left,"
        " and shown in the middle; for long parts that lie at any angle",
        json_schema_extra=WHERE_SET,
    )
    aligned_width: float = Field(
        1.0, gt=0, le=4, description="of an aligned part: what image_size's width shows, as a share of the image's"
        " longer side", json_schema_extra=WHERE_SET,
    )  # fmt: skip
    calibration_fraction: float = Field(
        0.25, ge=0, lt=1,
        description="share of the training normals set aside for calibration; 0, for a handful of images: all are"
        " trained on, and the threshold comes from networks that each left some out (see cross_fitting)",
    )  # fmt: skip
    split_seed: int = Field(0, ge=0, description="which normals are set aside, and which images a limit keeps")
    max_train_images: int | None = Field(
        None, gt=0, description="at most so many training normals, calibration included; equal shares per class"
    )
    max_test_images: int | None = Field(
        None, gt=0, description="at most so many test images, each class and defect in proportion"
    )
    test_balance: Literal["proportional", "balanced"] = Field(
        "proportional", json_schema_extra=WHERE_SET,
        description="balanced: half of max_test_images are normal where there are enough, the anomalous in proportion",
    )  # fmt: skip
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="skip: leave an unreadable image out, count it and name it"
    )
    on_bad_shard: Literal["error", "skip"] = Field(
        "error",
        description="skip: leave out a shard that is missing, truncated or changed, count its images and name it;"
        " every shard is read once more to find out",
        json_schema_extra=WHERE_SET,
    )
    max_pixels: int = Field(
        64_000_000, gt=0, description="an image with more pixels is refused before it is decoded (decompression bomb)"
    )
    shuffle_window: int = Field(4096, gt=0, description="images among which the order is random when streaming")
    shards: str | None = Field(
        None,
        description="where the shards lie or go: a folder or s3://...; the run's own folder when empty",
        json_schema_extra=NO_EFFECT,
    )
    shard_format: Literal["encoded", "raw"] = Field(
        "encoded", description="encoded: files as they are; raw: uint8 pixels at image_size, if decoding is the limit",
        json_schema_extra=NO_EFFECT,
    )  # fmt: skip
    shard_mb: int = Field(128, gt=0, description="target size of a shard in MB", json_schema_extra=NO_EFFECT)
    cache_mb: int = Field(
        1024, ge=0, description="keep decoded training images in memory when they fit in this many MB per worker; what"
        " a network made of them for space feature may take as much again, unless data.grids keeps it",
        json_schema_extra=NO_EFFECT,
    )  # fmt: skip
    grids: str | None = Field(
        None,
        description="keep what space feature, latent or rotnet makes of every view of the training images, encoded once"
        " before training, as Parquet files that training then reads; run: in the run's folder until it is trained,"
        " else a folder or s3://... that runs, sweeps and benchmarks share; empty: remember it in memory while cache_mb"
        " lasts. Space pixel makes nothing that could be kept",
        json_schema_extra=NO_EFFECT,
    )
    grids_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="of grids; float32 changes no bit of the result, float16 takes half the room and changes the"
        " weights slightly",
        json_schema_extra=WHERE_SET,
    )
    spaces: str | None = Field(
        None, description="keep what a space that learns has learnt, for all runs that would learn the same, in a"
        " folder or s3://...; empty: each fits its own, but benchmarks and sweeps have a folder for latent and rotnet",
        json_schema_extra=NO_EFFECT,
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.spaces == "":
            raise ValueError("spaces is empty; give a folder or s3://..., or null for none")
        if self.grids == "":
            raise ValueError("grids is empty; give run, a folder or s3://..., or null for none")
        if self.grids is None and self.grids_dtype != "float32":
            raise ValueError(
                f"grids_dtype is {self.grids_dtype} and grids is not set, so nothing is kept; set data.grids to"
                " run, a folder or s3://..., or leave data.grids_dtype out"
            )
        if self.align != "none" and self.resize != "stretch":
            raise ValueError(
                f"align is {self.align} and resize {self.resize}; an aligned part is scaled by aligned_width alone,"
                " so leave data.resize out"
            )
        if self.align == "none" and self.aligned_width != 1.0:
            raise ValueError(f"aligned_width is {self.aligned_width} and align none; set data.align, or leave it out")
        if min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}; both sides must be at least 1")
        return self


class AugmentationConfig(Section):
    """Other views of the training images, for when there are few; only those named: a turned part may be a defect.

    A view is a change of the whole image by draws within these ranges, keyed by the image's id; view 0 is the image as
    it is. What a change moves in from outside repeats the image's edge.
    """

    horizontal_flip: bool = Field(False, description="half of the views left to right", json_schema_extra=WHERE_SET)
    vertical_flip: bool = Field(False, description="half of the views upside down", json_schema_extra=WHERE_SET)
    quarter_turns: bool = Field(
        False, description="by 0 to 3 quarters; square images only", json_schema_extra=WHERE_SET
    )
    rotation: float = Field(
        0.0, ge=0, le=180, description="by up to so many degrees either way", json_schema_extra=WHERE_SET
    )
    shift: float = Field(
        0.0, ge=0, lt=0.5, description="by up to this share of a side, along each", json_schema_extra=WHERE_SET
    )
    scale: float = Field(
        0.0, ge=0, lt=0.9, description="larger or smaller by up to this share", json_schema_extra=WHERE_SET
    )
    brightness: float = Field(
        0.0, ge=0, lt=0.9, description="brighter or darker by up to this share", json_schema_extra=WHERE_SET
    )
    views: int = Field(
        16,
        ge=0,
        description="different views of an image that training sees, its own among them, so that what a network made of"
        " them can be remembered; 0: another in each epoch",
        json_schema_extra=WHERE_SET,
    )

    @property
    def changes(self) -> bool:
        """Whether any change is named."""
        return any(getattr(self, name) for name in type(self).model_fields if name != "views")


class TilesConfig(Section):
    """A model that sees a part of an image at a time: trained on crops, and a map of the whole joined from tiles."""

    size: tuple[int, int] | None = Field(
        None,
        description="height and width in pixels of what the model sees at once; empty: the whole image",
        json_schema_extra=WHERE_SET,
    )
    overlap: float = Field(
        0.25, ge=0, le=0.75, description="share of a tile's side that it has in common with the next, at least",
        json_schema_extra=WHERE_SET,
    )  # fmt: skip
    cell: int = Field(
        4,
        ge=1,
        description="side in pixels of a cell of the evidence that is kept and judged; what a scorer finds in finer"
        " detail is averaged, so that an image costs 4 bytes per cell and map",
        json_schema_extra=WHERE_SET,
    )
    crops: Literal["regular", "random"] = Field(
        "regular",
        description="where training crops lie: where tiles will, which lets what a network made of them be remembered,"
        " or anywhere",
        json_schema_extra=WHERE_SET,
    )
    per_call: int = Field(
        16, ge=1, description="tiles of an image that are looked at together", json_schema_extra=NO_EFFECT
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size is not None and (min(self.size) < 1 or any(side % self.cell for side in self.size)):
            raise ValueError(
                f"size is {self.size} and cell {self.cell}; both sides must be multiples of cell, at least one of it"
            )
        return self


class ScheduleConfig(Section):
    """The noise schedule: how much signal is left at each of T steps."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "squaredcos_cap_v2"
    num_train_timesteps: int = Field(1000, ge=2, description="T")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="first beta of linear, scaled_linear and sigmoid")
    beta_end: float = Field(2e-2, gt=0, lt=1, description="last beta of linear, scaled_linear and sigmoid")
    rescale_to_zero_terminal_snr: bool = Field(False, description="Lin et al. 2024 (arXiv:2305.08891), algorithm 1")


class ObjectiveConfig(Section):
    """What the denoiser predicts and how the loss weighs the steps."""

    prediction_type: Literal["epsilon", "sample", "v_prediction", "deviation"] = Field(
        "epsilon",
        description="deviation: patches of the image are corrupted, and what they deviate by is predicted; for scoring"
        " deviation_correction",
    )
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    min_snr_gamma: float = Field(5.0, gt=0, description="Hang et al. 2023 (arXiv:2303.09556)")
    step_range: tuple[float, float] = Field(
        (0.0, 1.0), description="lowest and highest step that is trained, as shares of T; scorers must stay within"
    )
    corrupted: float = Field(
        0.7, gt=0, le=1, description="deviation: highest share of an image's patches that is corrupted",
        json_schema_extra=WHERE_SET,
    )  # fmt: skip
    shuffled: float = Field(
        0.3, ge=0, le=1, description="deviation: highest share of these that other patches replace, not noise",
        json_schema_extra=WHERE_SET,
    )  # fmt: skip
    patch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 1, 1, 1, 2, 2, 2, 4, 4, 8),
        min_length=1,
        description="deviation: sides of the patches, in cells of what is diffused; twice in the list, twice as often",
        json_schema_extra=WHERE_SET,
    )
    condition: Literal["none", "class", "rotation"] = Field(
        "none",
        description="what the denoiser is told: nothing, the image's class, or by how many quarter turns it was rotated"
        " (each training image by 0 to 3 of them)",
    )
    condition_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels replaced by 'none' when there is a condition"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.step_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"step_range is {list(self.step_range)}; it must rise, between 0 and 1")
        return self


class TrainingConfig(Section):
    """The optimisation: a fixed budget of steps, AdamW, the average of the weights at the end."""

    num_steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="images per optimiser step, over all workers")
    accumulation_steps: int = Field(1, ge=1, description="backward passes per optimiser step and worker")
    learning_rate: float = Field(1e-3, gt=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norms above this are scaled down")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="per step; 0 keeps the last weights")
    horizontal_flip: bool = Field(False, description="flip half of the training images left to right")
    balance_classes: bool = Field(False, description="small classes are seen more often", json_schema_extra=WHERE_SET)
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, weights stay float32")
    compile: bool = Field(False, description="torch.compile")
    channels_last: bool = Field(False, description="memory layout NHWC")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints", json_schema_extra=NO_EFFECT)
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=NO_EFFECT)
    log_every: int = Field(20, ge=1, json_schema_extra=NO_EFFECT)
    validate_every: int = Field(200, ge=1, description="steps between held-out losses", json_schema_extra=NO_EFFECT)
    validation_images: int = Field(256, ge=1, json_schema_extra=NO_EFFECT)


class CalibrationConfig(Section):
    """The threshold, from normal images alone."""

    target_fpr: float = Field(0.05, gt=0, lt=1, description="share of normal images that may be called anomalous")
    folds: int = Field(
        5, ge=2, description="scores for the threshold come from statistics fitted without the image's own fold"
    )
    max_images: int | None = Field(
        None,
        ge=4,
        description="statistics and threshold from the first so many calibration normals at most; all by default",
        json_schema_extra=WHERE_SET,
    )


class CrossFittingConfig(Section):
    """Networks trained beside the run's own, each without a fold of the training images, which it can then judge.

    Only where something needs them: ``data.calibration_fraction`` 0, or ``contamination.max_share``.
    """

    folds: int = Field(
        4,
        ge=0,
        description="of the training images, at most as many as there are; 0: none, and a threshold without images set"
        " aside comes from unseen views of trained ones, which may be far too low",
        json_schema_extra=WHERE_SET,
    )
    num_steps: int | None = Field(
        None,
        ge=1,
        description="optimiser steps of a fold's network; training.num_steps when empty",
        json_schema_extra=WHERE_SET,
    )
    views: int = Field(
        8,
        ge=1,
        description="views of each image in a threshold without images set aside, where augmentation makes any",
        json_schema_extra=WHERE_SET,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds is 1; one fold leaves nothing to train on: give 2 or more, or 0")
        return self


class ContaminationConfig(Section):
    """Anomalies among the training normals: found by networks that were trained without them, and weighed down.

    An image is suspect where its score lies more than ``cutoff`` robust deviations above the median (1.4826 times the
    median absolute deviation; Iglewicz and Hoaglin 1993).
    """

    max_share: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="of the training images at most this share is taken for anomalous, and of the calibration images;"
        " 0: the images are trusted",
        json_schema_extra=WHERE_SET,
    )
    cutoff: float = Field(
        2.5, ge=0, description="robust deviations above which an image is suspect", json_schema_extra=WHERE_SET
    )
    weight: float = Field(
        0.0, ge=0, lt=1, description="what a suspect counts in the loss; 0: left out", json_schema_extra=WHERE_SET
    )


class DistillationConfig(Section):
    """Of a student: whose work it learns to do in one evaluation. Written by ``raydiff distill``."""

    teacher: str = Field(
        pattern="^[0-9a-f]{64}$", description="digest of the teacher's artefact, which lies in the run's folder"
    )
    num_evaluations: int = Field(
        ge=2, description="network evaluations of the teacher's that one of the student's stands for"
    )


class ExecutionConfig(Section):
    """Where and how it runs. Nothing here can change a score."""

    num_workers: int = Field(1, ge=1, description="Ray Train workers", json_schema_extra=NO_EFFECT)
    min_workers: int | None = Field(
        None,
        ge=1,
        description="elastic: train with no fewer than this while nodes are missing; all of num_workers when empty",
        json_schema_extra=NO_EFFECT,
    )
    use_gpu: bool = Field(False, json_schema_extra=NO_EFFECT)
    cpus_per_worker: float = Field(1.0, gt=0, json_schema_extra=NO_EFFECT)
    max_failures: int = Field(
        3, ge=0, description="restarts from the last checkpoint before the run fails", json_schema_extra=NO_EFFECT
    )
    scoring_batch_size: int = Field(
        64, ge=1, description="images per call when scoring many", json_schema_extra=NO_EFFECT
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, more than num_workers ({self.num_workers}); lower it, or leave it"
                " out to wait for all workers"
            )
        return self
