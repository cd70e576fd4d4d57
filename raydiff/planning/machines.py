"""What is known of GPUs, links and processes before anything is measured on them, each with its source.

Peaks are those of the makers' data sheets, dense (without structured sparsity), at the clock that the maker promises:
what a program reaches is less, and :data:`UTILISATION` says how much less is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from raydiff.errors import ConfigError
from raydiff.registry import nearest

__all__ = [
    "BUCKET_BYTES",
    "CUDA_CONTEXT_BYTES",
    "FORWARD_PASSES",
    "GETS_PER_S",
    "GPUS",
    "HOP_SECONDS",
    "LAUNCH_SECONDS",
    "NETWORK_GBIT",
    "PASSES",
    "RAY_BYTES",
    "SERVED_SHARE",
    "STARTUP_SECONDS",
    "STORAGE_BYTES_PER_S",
    "UTILISATION",
    "Gpu",
    "gpu_named",
]


@dataclass(frozen=True)
class Gpu:
    """Peaks in FLOP/s: ``float32`` of plain arithmetic, ``tf32`` and ``bfloat16`` of the tensor cores.

    ``memory_bytes`` and ``memory_bytes_per_s`` are the card's; ``link_bytes_per_s`` is what it sends to another card of
    the same node in one direction. Where a card has no tensor cores for a format, the figure is ``float32``'s.
    """

    name: str
    float32: float
    tf32: float
    bfloat16: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    source: str


def _gpu(name: str, teraflops: tuple[float, float, float], memory: tuple[float, float], link: float, at: str) -> Gpu:
    """From TFLOP/s (float32, TF32, bfloat16), memory in GB and GB/s, link in GB/s of one direction."""
    float32, tf32, bfloat16 = (1e12 * value for value in teraflops)
    return Gpu(name, float32, tf32, bfloat16, memory[0] * 1e9, memory[1] * 1e9, link * 1e9, at)


_PCIE_3, _PCIE_4 = 16.0, 32.0  # GB/s of one direction at 16 lanes (PCI-SIG)

GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", (8.1, 8.1, 8.1), (16, 320), _PCIE_3, "NVIDIA T4 data sheet (no TF32, no bfloat16)"),
        _gpu("v100", (15.7, 15.7, 15.7), (16, 900), 150, "NVIDIA V100 SXM2 data sheet (no TF32, no bfloat16)"),
        _gpu("a10g", (31.5, 35, 70), (24, 600), _PCIE_4, "NVIDIA A10G data sheet (AWS g5)"),
        _gpu("a10", (31.2, 62.5, 125), (24, 600), _PCIE_4, "NVIDIA A10 data sheet"),
        _gpu("l4", (30.3, 60, 121), (24, 300), _PCIE_4, "NVIDIA L4 data sheet, half of the figures with sparsity"),
        _gpu("l40s", (91.6, 183, 362), (48, 864), _PCIE_4, "NVIDIA L40S data sheet"),
        _gpu("a100-40gb", (19.5, 156, 312), (40, 1555), 300, "NVIDIA A100 data sheet, SXM"),
        _gpu("a100-80gb", (19.5, 156, 312), (80, 2039), 300, "NVIDIA A100 data sheet, SXM"),
        _gpu("h100", (67, 494, 989), (80, 3350), 450, "NVIDIA H100 data sheet, SXM, half of the figures with sparsity"),
        _gpu("h200", (67, 494, 989), (141, 4800), 450, "NVIDIA H200 data sheet, SXM, half of those with sparsity"),
    )
}
"""By the name that ``--gpu-type`` takes."""

UTILISATION = 0.3
"""Share of the peak that convolutions and matrix products reach, where nothing was measured on the GPU.

Large transformers are reported at 0.21 to 0.46 (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, table 3); the
small networks here fill a GPU less. ``--utilisation`` sets another, ``--profile`` needs none.
"""

PASSES = 5
"""How often each byte kept for the backward pass goes through memory: written and read on the way forward, read on the
way back, and its gradient written and read. What is fused takes fewer, normalisations take more."""

FORWARD_PASSES = 2
"""Those of a forward pass alone."""

LAUNCH_SECONDS = 8e-6
"""Host time per operation that PyTorch starts on a GPU, eager: 5 to 10 microseconds (PyTorch's documentation of CUDA
graphs names this cost as their reason; the figure is an assumption)."""

BUCKET_BYTES = 25 * 2**20
"""Gradients that DistributedDataParallel sends together (``bucket_cap_mb=25``); the last bucket overlaps with nothing
(Li et al. 2020, arXiv:2006.15704)."""

HOP_SECONDS = 20e-6
"""Latency of one message between nodes, an assumption; NCCL's trees need 2 log2(W) in a row for an all-reduce."""

NETWORK_GBIT = 25.0
"""Link of a node, Gbit/s, where ``--network`` does not say: an assumption."""

STORAGE_BYTES_PER_S = 1e9
"""What a node reads from or writes to shared storage where ``--storage`` does not say, on more nodes than one: an
assumption, about a third of a 25 Gbit/s link."""

GETS_PER_S = 5500
"""GET requests per second that Amazon S3 promises at least for one prefix (Amazon S3 Developer Guide, request rate and
performance guidelines); more are refused for a while, until it has divided the prefix."""

CUDA_CONTEXT_BYTES = 0.6e9
"""What a process takes of a GPU's memory before its first tensor (context, kernels of cuDNN and cuBLAS): an assumption,
0.3 to 0.8 GB by driver and card."""

RAY_BYTES = 0.93e9
"""Resident memory of Ray's own processes on a node, without the dashboard, measured (sum of RSS, Ray 2.60)."""

STARTUP_SECONDS = {1: 18.0, 2: 24.9}
"""``raydiff fit`` beside its training: Ray's start, shards of the digits, workers, calibration; by number of workers,
measured on two busy cores (docs/RESULTS.md, training overhead). More workers on other nodes start beside each other."""

SERVED_SHARE = 0.82
"""Images/s of one replica behind ``raydiff serve`` over those of scoring files, measured (docs/RESULTS.md)."""


def gpu_named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ConfigError: it is not in it.
    """
    key = name.lower().replace("_", "-").removeprefix("nvidia-")
    if key not in GPUS:
        known = sorted(GPUS)
        near = [each for each in known if each.startswith(f"{key}-") or key.startswith(f"{each}-")]
        hint = f"did you mean {' or '.join(near)}?" if near else nearest(key, known)
        there = f"there are: {', '.join(known)}"
        raise ConfigError(
            f"--gpu-type {name}: is not in the table; {hint if hint == there else f'{hint} {there}'}; for another one"
            " measure there with raydiff plan CONFIG --measure FILE, and plan with --profile FILE"
        )
    return GPUS[key]
