"""The core beside the same networks run the plain diffusers way, in one process, as ratios; on a CPU or a GPU.

    python -m benchmarks.core_speed [--device cuda] [--only training scoring ensemble] [--turns 5]

**Training**: images/s of raydiff's loop (seeded noise per image, bfloat16, averaged weights, metrics; and the same
compiled) over a loop as in diffusers' own training example (``UNet2DModel`` or ``DiTTransformer2DModel``, float32,
``DDPMScheduler``, AdamW, ``EMAModel``, one batch at a time), and the share of the device's dense bfloat16 rate that the
model's own operations take (MFU: forward and backward FLOPs as torch counts them, without anything computed twice).
**Scoring**: milliseconds per image of ``Detector.predict`` at 256 px, from float images to scores and maps, over the
same networks called the plain way in float32 (timm's features, scheduler, denoiser, step after step), and ONNX Runtime
on a CPU. **Ensemble**: ``Detector.predict`` of ``fine`` and ``deep`` of benchmarks.pyramid, and of both as one, with
the backbone called once for both and once for each. Weights are fresh: speed does not depend on them.

Turns alternate between the variants, so that a busy machine slows all of them; ratios are taken per turn. On a GPU
the networks have published sizes (DDPM's U-Net at 32 px, DiT-B/16 at 256 px), on a CPU smaller ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raydiff.compiling import compiled
from raydiff.config import ExperimentConfig
from raydiff.contracts import Scores
from raydiff.detector import DiffusionDetector, EnsembleDetector
from raydiff.exported import load_exported
from raydiff.exporting import export
from raydiff.images import to_tensor
from raydiff.planning.machines import GPUS
from raydiff.provenance import hardware, source_commit
from raydiff.runtime import LocalRuntime
from raydiff.shards import TrainingBatch
from raydiff.training import HeldOut, train

T = 1000
PARTS = ("training", "scoring", "ensemble")
FEATURES = {
    "space": {"name": "feature"},
    "denoiser": {"name": "convnet", "width": 192, "num_blocks": 5},
    "objective": {"prediction_type": "sample"},
    "scoring": {"name": "denoising_error", "num_inference_steps": 1, "start": 0.6, "stop": 0.7},
}
CLEAN = {"name": "denoising_error", "start_from": "clean", "num_inference_steps": 1, "start": 0.7, "stop": 0.8,
         "normalise": "pixel", "blur": 0, "pooling": "top_k", "pooling_share": 0.03}  # fmt: skip
FINE = FEATURES | {"scoring": CLEAN}
DEEP = FINE | {
    "space": {"name": "feature", "levels": (3, 4), "neighbourhood": 3, "num_components": 256},
    "denoiser": {"name": "convnet", "width": 192, "num_blocks": 5, "kernel_size": 1},
}


@dataclass(frozen=True)
class Case:
    """A network to train: its name, the config's fields, and the same network as diffusers builds it."""

    name: str
    side: int
    batch: int
    denoiser: Mapping[str, Any]
    plain: Callable[[], nn.Module]


def unet(side: int, widths: tuple[int, ...], layers: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=side, in_channels=3, out_channels=3, layers_per_block=layers, block_out_channels=widths,
            down_block_types=tuple("AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in range(len(widths))),
            up_block_types=tuple("AttnUpBlock2D" if i == 1 else "UpBlock2D" for i in reversed(range(len(widths)))),
            attention_head_dim=8, norm_num_groups=8,
        )  # fmt: skip

    return build


def dit(side: int, patch: int, depth: int, width: int, heads: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, in_channels=3, out_channels=3,
            num_layers=depth, sample_size=side, patch_size=patch, num_embeds_ada_norm=T,
        )  # fmt: skip

    return build


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            Case("U-Net 64-128, 32 px", 32, 32, _unet((64, 128), 1), unet(32, (64, 128), 1)),
            Case("DiT-S/8, 64 px", 64, 16, {"name": "dit", "size": "S", "patch_size": 8}, dit(64, 8, 12, 384, 6)),
        ]
    wide = (128, 256, 256, 256)
    return [
        Case("DDPM's U-Net, 32 px", 32, 256, _unet(wide, 2), unet(32, wide, 2)),
        Case("DiT-B/16, 256 px", 256, 128, {"name": "dit", "size": "B", "patch_size": 16}, dit(256, 16, 12, 768, 12)),
    ]


def _unet(widths: tuple[int, ...], layers: int) -> dict[str, Any]:
    return {"name": "unet", "block_out_channels": widths, "layers_per_block": layers, "attention_levels": (1,)}


def training_config(case: Case, steps: int, *, compiled: bool) -> ExperimentConfig:
    training = {
        "num_steps": steps, "batch_size": case.batch, "precision": "bfloat16", "channels_last": True,
        "compile": compiled, "log_every": max(1, steps // 3), "validate_every": 10**6, "checkpoint_every": 10**6,
        "warmup_steps": 0, "learning_rate": 1e-4, "validation_images": 1,
    }  # fmt: skip
    data = {"dataset": {"name": "folder", "source": "none"}, "image_size": (case.side, case.side), "channels": 3}
    return ExperimentConfig.model_validate({"data": data, "denoiser": case.denoiser, "training": training})


def ours(case: Case, device: str, steps: int, *, compiled: bool) -> float:
    """Images/s of the last two thirds of a run of raydiff's own loop; the first holds compilation and warm-up."""
    images = some_images(4 * case.batch, case.side)
    lines: list[Mapping[str, Any]] = []

    def stream(first: int) -> Iterator[TrainingBatch]:
        for step in range(first, steps):
            rows = np.arange(case.batch) + step % 4 * case.batch
            ids = [str(row) for row in rows]
            yield TrainingBatch(ids, np.full(len(rows), step // 4), images[rows], np.zeros(len(rows), np.int64))

    held_out = HeldOut(to_tensor(images[:1]), torch.zeros(1, dtype=torch.int64), ["0"])
    config = training_config(case, steps, compiled=compiled)
    with tempfile.TemporaryDirectory() as folder:
        train(config, stream, held_out, LocalRuntime(Path(folder), device, 1, lines.append), num_classes=1)
    return statistics.harmonic_mean([line["images_per_second"] for line in lines if "loss" in line][1:])


def plain(case: Case, device: str, steps: int) -> float:
    """Images/s of the loop of diffusers' unconditional training example, in memory, after a third of the steps."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    network = case.plain().to(device).train()
    scheduler = DDPMScheduler(num_train_timesteps=T)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    average = EMAModel(network.parameters(), decay=0.995)
    images = torch.from_numpy(some_images(4 * case.batch, case.side)).permute(0, 3, 1, 2)
    labels = torch.zeros(case.batch, dtype=torch.int64, device=device)
    begun = 0.0
    for step in range(steps):
        if step == steps // 3:
            synchronise(device)
            begun = time.perf_counter()
        clean = (images[step % 4 * case.batch :][: case.batch].float() / 127.5 - 1).to(device)
        noise = torch.randn_like(clean)
        t = torch.randint(0, T, (case.batch,), device=device)
        noisy = scheduler.add_noise(clean, noise, t)  # type: ignore[arg-type]
        guess = network(noisy, t) if "UNet" in type(network).__name__ else network(noisy, t, class_labels=labels)
        functional.mse_loss(guess.sample, noise).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(network.parameters())
    synchronise(device)
    return (steps - steps // 3) * case.batch / (time.perf_counter() - begun)


def flops_per_image(case: Case) -> float:
    """Forward and backward of raydiff's network, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    detector = DiffusionDetector.create(training_config(case, 1, compiled=False), num_classes=1)
    x = torch.zeros(1, 3, case.side, case.side)
    with FlopCounterMode(display=False) as counter:
        detector.network.train()(x, torch.zeros(1, dtype=torch.int64), None).sum().backward()
    return float(counter.get_total_flops())


def peak(device: str) -> float:
    """Dense bfloat16 FLOP/s: the card's data sheet, or on a CPU the best of five products of 1,024 x 1,024."""
    if device != "cpu":
        called = torch.cuda.get_device_name().lower()
        if found := [card for name, card in GPUS.items() if name.split("-")[0] in called.split()]:
            return found[0].bfloat16
    a = torch.randn(1024, 1024, dtype=torch.bfloat16, device=device)
    return 2 * 1024**3 / min(timed(lambda: a @ a, device) for _ in range(5))


def some_images(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str, *, processor: bool = False) -> float:
    """Seconds of one call, the device waited for; or what the process' threads took of the processors."""
    clock = time.process_time if processor else time.perf_counter
    synchronise(device)
    begun = clock()
    call()
    synchronise(device)
    return clock() - begun


def training(device: str, turns: int, steps: int) -> None:
    limit = peak(device)
    print(f"\n| training, {device} | images/s | over diffusers | MFU |\n|---|---|---|---|")
    for case in cases(device):
        variants = {
            "diffusers, float32": lambda case=case: plain(case, device, steps),
            "raydiff, bfloat16": lambda case=case: ours(case, device, steps, compiled=False),
            "raydiff, compiled": lambda case=case: ours(case, device, steps, compiled=True),
        }
        found: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(turns):
            for name, measure in variants.items():
                found[name].append(measure())
        work = flops_per_image(case)
        for name, speeds in found.items():
            ratios = [a / b for a, b in zip(speeds, found["diffusers, float32"], strict=True)]
            utilised = statistics.median(speeds) * work / limit
            print(
                f"| {case.name}, {name} | {spread(speeds, '.1f')} | {spread(ratios, '.2f')} | {utilised:.3f} |",
                flush=True,
            )
    print(f"\nbfloat16 peak {limit / 1e12:.2f} TFLOP/s")


def scorer(device: str, features: Mapping[str, Any] = FEATURES) -> DiffusionDetector:
    """The detector of examples/configs/photographs.yaml, or another, at 256 px: fresh weights, calibrated on noise."""
    fields = {"data": {"dataset": {"name": "folder", "source": "none"}, "image_size": (256, 256), "channels": 3}}
    config = ExperimentConfig.model_validate({**fields, **features})
    images = to_tensor(some_images(8, 256))
    detector = DiffusionDetector.create(config, num_classes=1, device=device)
    detector.space.fit(images.to(device))
    return detector.calibrate(images)


class PlainScorer:
    """The same weights, called as timm and diffusers show it."""

    def __init__(self, detector: DiffusionDetector) -> None:
        from diffusers import DDPMScheduler

        from raydiff.backbone import Backbone, BackboneOptions

        options = detector.space.options  # type: ignore[attr-defined]
        backbone = Backbone(BackboneOptions(backbone=options.backbone, levels=options.levels)).load()
        self.network, self.normalise = backbone._built().to(detector.device), backbone._normalised
        state = detector.space.state()
        self.mean, self.projection = (state[name].to(detector.device) for name in ("mean", "projection"))
        self.denoiser, self.device = detector.network, detector.device
        self.scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        maps = self.network(self.normalise(images.to(self.device)).contiguous())
        grid = [functional.interpolate(level, (16, 16), mode="bilinear") for level in maps]
        x = torch.einsum("kd,bdhw->bkhw", self.projection, torch.cat(grid, 1) - self.mean[:, None, None])
        t = torch.full((len(x),), 600, device=x.device)
        noisy = self.scheduler.add_noise(x, torch.randn_like(x), t)  # type: ignore[arg-type]
        errors = (self.denoiser(noisy, t, None) - x).square().mean(1, keepdim=True)
        return functional.interpolate(errors, (256, 256), mode="bilinear").cpu()


def scoring(device: str, turns: int) -> None:
    detector = scorer(device)
    variants: dict[str, Callable[[Tensor], object]] = {
        "timm and diffusers, float32": PlainScorer(detector), "raydiff": detector.predict,
    }  # fmt: skip
    if device != "cpu":  # on a CPU ONNX Runtime is quicker
        variants["raydiff, compiled"] = compiled(detector).predict
    with tempfile.TemporaryDirectory() as folder:
        if device == "cpu":
            export(detector, Path(folder) / "detector.onnx")
            variants["ONNX Runtime"] = load_exported(Path(folder) / "detector.onnx").predict
        print(f"\n| scoring at 256 px, {device} | batch | ms/image | over timm and diffusers |\n|---|---|---|---|")
        for size in (1, 64 if device != "cpu" else 16):
            found = milliseconds(variants, size, device, turns)
            slow = found["timm and diffusers, float32"]
            for name, taken in found.items():
                ratios = [a / b for a, b in zip(slow, taken, strict=True)]
                print(f"| {name} | {size} | {spread(taken, '.2f')} | {spread(ratios, '.2f')} |", flush=True)


class Apart(EnsembleDetector):
    """An ensemble whose members each call their own backbone."""

    def _score(self, images: Tensor) -> Scores:
        return self.combined([member.score(images) for member in self.members])


def ensemble(device: str, turns: int) -> None:
    fine, deep = scorer(device, FINE), scorer(device, DEEP)
    both = EnsembleDetector.create([fine, deep], "mean", {}).calibrate(to_tensor(some_images(8, 256)))
    apart = Apart(**{entry.name: getattr(both, entry.name) for entry in fields(both)})
    images = to_tensor(some_images(3, 256))
    assert device != "cpu" or torch.equal(both.score(images).image, apart.score(images).image)
    variants: dict[str, Callable[[Tensor], object]] = {
        "fine": fine.predict, "deep": deep.predict, "both, one backbone": both.predict, "both, two": apart.predict,
    }  # fmt: skip
    print(
        f"\n| ensemble at 256 px, {device} | batch | ms/image | processor ms/image | of fine's | of both's with two |"
    )
    print("|---|---|---|---|---|---|")
    for size in (1, 8):
        clocks = (
            milliseconds(variants, size, device, turns),
            milliseconds(variants, size, device, turns, processor=True),
        )
        compared = clocks[device == "cpu"]  # what else the machine does is not in a processor's time
        for name, taken in compared.items():
            times = [spread(clock[name], ".1f") for clock in clocks]
            ratios = [[a / b for a, b in zip(taken, compared[base], strict=True)] for base in ("fine", "both, two")]
            cells = times + [spread(ratio, ".2f") for ratio in ratios]
            print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)


def milliseconds(
    variants: Mapping[str, Callable[[Tensor], object]], size: int, device: str, turns: int, *, processor: bool = False
) -> dict[str, list[float]]:
    """Per image of a batch, by the clock or the processor's, of each variant in every turn but the first, a warm-up."""
    images = to_tensor(some_images(size, 256))
    calls = {name: partial(call, images) for name, call in variants.items()}
    taken = in_turns(calls, device, turns, processor=processor)
    return {name: [1000 * seconds / size for seconds in found] for name, found in taken.items()}


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: str, turns: int, *, processor: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, by the clock or the processor's, in every turn but the first, a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            seconds = timed(call, device, processor=processor)
            if turn:
                found[name].append(seconds)
    return found


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, help="per turn and variant; by default 30 on a CPU, 150 on a GPU")
    arguments = parser.parse_args()
    print(f"{hardware(arguments.device)}; commit {source_commit()}; {arguments.turns} turns; "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    if "training" in arguments.only:
        training(arguments.device, arguments.turns, arguments.steps or (30 if arguments.device == "cpu" else 150))
    if "scoring" in arguments.only:
        scoring(arguments.device, max(9, arguments.turns))
    if "ensemble" in arguments.only:
        ensemble(arguments.device, max(15, arguments.turns))


if __name__ == "__main__":
    main()
