"""Tiles: what they cost in memory, what they win on small defects, and whether the map shows where they end.

    python -m benchmarks.tiles memory
    python -m benchmarks.tiles defects SOURCE [--out DIR] [--seed N] [--set PATH=VALUE ...]
    python -m benchmarks.tiles planted SOURCE [--out DIR] [--seed N] [--count N] [--sizes N ...]
    python -m benchmarks.tiles picture SOURCE [--out DIR] [--to tiles.png]

``memory``: the peak of a process above what it had after scoring one image of a tile's size, for images of 512 to
4,096 px, in pixels and in features, whole and in tiles; networks are untrained, which changes no byte of memory.

``defects``: a category in the MVTec-AD layout, resized to 256 px and at 1,024 px in tiles of 256 px, the same frozen
network, denoiser, budget and number of worst cells; then the step of the evidence across tile borders over that
elsewhere, with the overlap and without. ``planted``: the same detectors, and spots of a few pixels planted in normal
test images. ``picture`` draws test images, their defects and both maps.

Runs in this process on one thread, without Ray; a finished training is not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from raydiff.config import ExperimentConfig, load_config
from raydiff.core.metrics import image_metrics
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.evaluation import evaluate
from raydiff.experiment import ARTIFACT, fit_locally
from raydiff.heatmap import overlay
from raydiff.images import ImageSpec, decode, encode_png, to_tensor, to_uint8
from raydiff.provenance import hardware, source_commit
from raydiff.results import save_evaluations
from raydiff.shards import ShardSet, write_shards
from raydiff.tracking import progress_line

TILED = Path("examples/configs/photographs_tiled.yaml")
WHOLE = {"data.image_size": [256, 256], "tiles.size": None, "scoring.pooling_share": 0.05}
METRICS = ("auroc", "average_precision", "tpr_at_5_fpr", "pixel_auroc", "pixel_average_precision", "aupro")
SIZES = (512, 1024, 2048, 4096)
LARGEST_WHOLE = {"pixels": 1024, "features": 2048}  # attention over the pixels of 2,048 px takes an hour on a core


# --- memory -----------------------------------------------------------------------------------------------------------


def small_config(kind: str, size: int, *, tiled: bool) -> ExperimentConfig:
    """One evaluation per tile: a small U-Net on pixels (tiles of 128 px), or the recipe on features (256 px)."""
    shape = {"data.image_size": [size, size]}
    if kind == "features":
        return load_config(TILED).override(shape | ({} if tiled else {"tiles.size": None}))
    network = {"denoiser.block_out_channels": [16, 32, 32], "denoiser.attention_levels": []}
    scoring = {"scoring.num_inference_steps": 1, "scoring.normalise": "none"}
    return ExperimentConfig().override(shape | network | scoring | ({"tiles.size": [128, 128]} if tiled else {}))


def untrained(config: ExperimentConfig) -> DiffusionDetector:
    detector = DiffusionDetector.create(config, num_classes=1)
    side = config.model_size
    noise = torch.rand(4, config.data.channels, *side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if detector.space.num_fit_images:
        detector.space.fit(noise)
    return replace(detector, statistics=detector.scorer.fit(torch.rand(8, 1, 4, 4)))


def peak_mb() -> float:
    """The highest resident set of this process since :func:`reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(kind: str, size: int, tiled: bool) -> None:
    """One size, in a process of its own; prints JSON."""
    torch.set_num_threads(1)
    smallest = 128 if kind == "pixels" else 256
    warm = untrained(small_config(kind, smallest, tiled=tiled))
    warm.score(torch.zeros(1, warm.config.data.channels, smallest, smallest))
    detector = replace(warm, config=small_config(kind, size, tiled=tiled))
    if not tiled:
        detector = untrained(small_config(kind, size, tiled=False))
    image = torch.rand(1, detector.config.data.channels, size, size) * 2 - 1
    reset_peak()
    before = peak_mb()
    begun = time.perf_counter()
    scores = detector.score(image)
    seconds = time.perf_counter() - begun
    assert scores.map is not None
    found = {
        "above_mb": peak_mb() - before, "image_mb": image.nbytes / 2**20, "map_mb": scores.map.nbytes / 2**20,
        "seconds": seconds, "evaluations": detector.num_evaluations,
    }  # fmt: skip
    print(json.dumps(found))


def memory() -> None:
    print(f"{hardware('cpu')}, commit {source_commit()}")
    print("| | px | image MB | map MB | peak above the image, MB | less the map | tiles | s |\n" + "|---" * 8 + "|")
    for kind in ("pixels", "features"):
        for tiled in (False, True):
            for size in SIZES if tiled else [size for size in SIZES if size <= LARGEST_WHOLE[kind]]:
                command = [sys.executable, "-m", "benchmarks.tiles", "one", kind, str(size), str(int(tiled))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                row = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {kind}, {'tiles' if tiled else 'whole'} | {size} | {row['image_mb']:.0f} |"
                    f" {row['map_mb']:.0f} |"
                    f" {row['above_mb']:.0f} | {row['above_mb'] - row['map_mb']:.0f} | {row['evaluations']} |"
                    f" {row['seconds']:.1f} |",
                    flush=True,
                )


# --- defects ----------------------------------------------------------------------------------------------------------


def configs(arguments: argparse.Namespace) -> dict[str, ExperimentConfig]:
    base = load_config(TILED, [f"data.dataset.source={arguments.source}", f"seed={arguments.seed}", *arguments.set])
    return {"tiles": base, "whole": base.override(WHOLE)}


def trained(name: str, config: ExperimentConfig, out: Path) -> tuple[DiffusionDetector, ShardSet]:
    shards = write_shards(config.data, str(out / "shards"))  # encoded: the same files for any size
    place = out / f"{name}-seed{config.seed}"
    if not (place / ARTIFACT / "manifest.json").exists():
        steps, batch = config.training.num_steps, config.training.batch_size
        begun = time.perf_counter()
        fit_locally(config, place, shards, on_metrics=lambda m: print(name, progress_line(m, steps, batch), flush=True))
        print(f"{name}: fitted and calibrated in {time.perf_counter() - begun:.0f} s", flush=True)
    loaded = load_detector(place / ARTIFACT)
    assert isinstance(loaded, DiffusionDetector)
    return loaded, shards


def defects(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = []
    for name, config in configs(arguments).items():
        detector, shards = trained(name, config, arguments.out)
        found = evaluate(detector, shards, name=name)
        save_evaluations(arguments.out / "results.jsonl", [found])
        row = found.rows[0]
        rows.append(row)
        counted = f"{row.num_normal} normal, {row.num_anomalous} anomalous, NFE {row.num_evaluations}"
        print(f"\n{name}: {counted}, {row.ms_per_image:.0f} ms per image", flush=True)
        print(f"  at the threshold: FPR {row.realised_fpr}, TPR {row.realised_tpr}")
        for metric in METRICS:
            print(f"  {metric}: {row.metrics[metric]}", flush=True)
        for part in found.rows[1:]:
            print(f"  {part.subset}: auroc {part.metrics['auroc'].value:.3f}", flush=True)
        if detector.tiles is not None:
            seams(detector, shards)
    print(f"{hardware('cpu')}, commit {source_commit()}, {sys.argv}")


def seams(detector: DiffusionDetector, shards: ShardSet, count: int = 12) -> None:
    """Mean absolute step of normal test images' evidence across tile borders, over that elsewhere.

    Each image is rolled by a random number of cells, so that no place of the canvas has more to show than another.
    """
    assert detector.tiles is not None
    generator = torch.Generator().manual_seed(0)
    step, (height, width) = detector.tiles.tiling.step[0], detector.config.data.image_size
    rolled = []
    for image in normal_images(detector, shards, count):
        by = [int(torch.randint(side // step, (), generator=generator)) * step for side in (height, width)]
        rolled.append(image.roll(by, (-2, -1)))
    for overlap in (detector.config.tiles.overlap, 0.0):
        other = replace(detector, config=detector.config.override({"tiles.overlap": overlap}))
        ratio = step_ratio(other, other.measure(torch.stack(rolled)))
        print(f"  overlap {overlap}: step at borders over elsewhere {ratio:.3f}", flush=True)


def normal_images(detector: DiffusionDetector, shards: ShardSet, count: int) -> torch.Tensor:
    """The first normal test images, (n, C, H, W)."""
    found: list[np.ndarray] = []
    for batch in shards.read("test", detector.image_spec, batch_size=8):
        found += list(batch.images[~batch.is_anomaly])
        if len(found) >= count:
            break
    return to_tensor(np.stack(found[:count]))


def step_ratio(detector: DiffusionDetector, evidence: torch.Tensor) -> float:
    assert detector.tiles is not None
    tiling, (cells, _) = detector.tiles.tiling, detector.tiles.cells
    tile = tiling.tile_size[0]
    starts = [start * cells // tile for start in tiling.starts[0]]
    size = evidence.shape[-1]
    borders = sorted({s for s in starts if s} | {s + cells for s in starts if s + cells < size})
    steps = torch.cat(
        [evidence.diff(dim=-1).abs().mean((0, 1, 2))[None], evidence.diff(dim=-2).abs().mean((0, 1, 3))[None]]
    )
    at = torch.zeros(size - 1, dtype=torch.bool)
    at[[b - 1 for b in borders]] = True
    return float(steps[:, at].mean() / steps[:, ~at].mean())


# --- planted defects --------------------------------------------------------------------------------------------------


def planted(arguments: argparse.Namespace) -> None:
    """AUROC of normal test images with a spot planted on the part against the same images without, by its size."""
    torch.set_num_threads(1)
    built = {name: trained(name, config, arguments.out) for name, config in configs(arguments).items()}
    _, shards = built["tiles"]
    images = normal_images(built["tiles"][0], shards, arguments.count)
    print(f"{len(images)} images; spots of so many pixels at 1,024 px: AUROC (share that scores above its clean twin)")
    scores: dict[tuple[str, int], np.ndarray] = {}
    for size in (0, *arguments.sizes):
        marked = torch.stack([spotted(image, size, seed) for seed, image in enumerate(images)])
        for name, (detector, _) in built.items():
            seen = marked
            if tuple(marked.shape[2:]) != detector.config.data.image_size:
                seen = resized(marked, detector.image_spec)
            scores[name, size] = torch.cat([detector.score(one[None]).image for one in seen]).numpy()
            if size:
                clean, found = scores[name, 0], scores[name, size]
                labels = np.repeat([False, True], len(images))
                estimate = image_metrics(np.concatenate([clean, found]), labels)["auroc"]
                print(f"  {size} px, {name}: {estimate} ({(found > clean).mean():.2f})", flush=True)


def spotted(image: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """A copy with a soft-edged spot of ``size`` pixels across on the part, the darker half of the image's range."""
    if not size:
        return image
    grey = image.mean(0)
    dark = (grey < (grey.min() + grey.max()) / 2).nonzero()
    generator = torch.Generator().manual_seed(seed)  # the same place whatever the size
    y, x = dark[int(torch.randint(len(dark), (), generator=generator))].tolist()
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grey.shape), indexing="ij")
    distance = ((rows - y).square() + (columns - x).square()).float().sqrt()
    depth = ((size / 2 - distance) / 2 + 0.5).clamp(0, 1)  # an edge two pixels wide
    value = 1.0 if float(grey[y, x]) < -0.2 else -1.0  # bright where the part is dark, a hole where it is not
    return image + depth * 0.7 * (value - image)


def resized(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """As a file of these pixels would be decoded for another size."""
    files = [encode_png(pixels) for pixels in to_uint8(images)]
    return to_tensor(np.stack([decode(data, spec, "planted") for data in files]))


# --- picture ----------------------------------------------------------------------------------------------------------


def picture(arguments: argparse.Namespace) -> None:
    """Three test images with small defects: the image, its defect, the map of the whole and that of the tiles."""
    torch.set_num_threads(1)
    built = {name: trained(name, config, arguments.out) for name, config in configs(arguments).items()}
    _, shards = built["tiles"]
    side, chosen = 360, picked(shards)
    panels = Image.new("RGB", (4 * side, len(chosen) * side + 24), "white")
    drawing = ImageDraw.Draw(panels)
    for column, title in enumerate(("image", "defect", "resized to 256 px", "1,024 px in tiles of 256 px")):
        drawing.text((column * side + 8, 6), title, fill="black")
    for row, (pixels, mask, small) in enumerate(chosen):
        shown = [pixels, np.repeat(mask[:, :, None] * np.uint8(255), 3, axis=2)]
        for name, image in (("whole", small), ("tiles", pixels)):
            detector = built[name][0]
            assert detector.calibration is not None
            anomaly_map = detector.predict(to_tensor(image[None])).anomaly_map
            assert anomaly_map is not None
            shown.append(overlay(image, anomaly_map[0, 0].numpy(), detector.calibration.mask_threshold))
        for column, panel in enumerate(shown):
            panels.paste(Image.fromarray(panel).resize((side, side)), (column * side, row * side + 24))
    arguments.to.write_bytes(encode_png(np.asarray(panels)))


def picked(shards: ShardSet, count: int = 3) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The anomalous test image with the smallest defect of each kind, the first so many kinds: not chosen by score."""
    best: dict[str, tuple[int, np.ndarray, np.ndarray, np.ndarray]] = {}
    large, small = ImageSpec((1024, 1024), 3), ImageSpec((256, 256), 3)
    for batch, resized in zip(
        shards.read("test", large, batch_size=4), shards.read("test", small, batch_size=4), strict=True
    ):
        assert batch.masks is not None
        for i in np.flatnonzero(batch.is_anomaly):
            area = int(batch.masks[i].sum())
            if area and (batch.defects[i] not in best or area < best[batch.defects[i]][0]):
                best[batch.defects[i]] = area, batch.images[i], batch.masks[i], resized.images[i]
    return [best[name][1:] for name in sorted(best)[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("memory")
    one = commands.add_parser("one")
    one.add_argument("kind")
    one.add_argument("size", type=int)
    one.add_argument("tiled", type=int)
    for name in ("defects", "planted", "picture"):
        command = commands.add_parser(name)
        command.add_argument("source")
        command.add_argument("--out", type=Path, default=Path("runs/benchmark-tiles"))
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--set", action="append", default=[])
        if name == "planted":
            command.add_argument("--count", type=int, default=24, help="normal test images")
            command.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="pixels across")
        if name == "picture":
            command.add_argument("--to", type=Path, default=Path("tiles.png"))
    arguments = parser.parse_args()
    if arguments.command == "memory":
        memory()
    elif arguments.command == "one":
        measure_memory(arguments.kind, arguments.size, bool(arguments.tiled))
    else:
        {"defects": defects, "planted": planted, "picture": picture}[arguments.command](arguments)


if __name__ == "__main__":
    main()
