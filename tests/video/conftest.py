"""Clips of digits, made with the library that reads them, and folders of the same frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.experiment import split_batches
from raydiff.images import to_uint8
from raydiff.shards import ShardSet

Pictures = NDArray[np.uint8]


def write_clip(
    path: Path, pictures: Pictures, *, times: Sequence[float] | None = None, codec: str = "ffv1", rotate: bool = False,
    options: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Grey pictures (n, H, W) at 25 a second, or at their times, without loss by ``ffv1`` and ``png``."""
    import av

    pixel_format = {"ffv1": "bgr0", "mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures.shape[1:]
        stream.pix_fmt = pixel_format
        if codec != "mpeg2video":  # which knows few
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotate:  # the display matrix of a quarter turn counter-clockwise, ISO/IEC 14496-12, 6.2.2
            stream.set_display_matrix([0, -(1 << 16), 0, 1 << 16, 0, 0, 0, 0, 1 << 30])
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.repeat(picture[:, :, None], 3, axis=2), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (i / 25 if times is None else times[i])), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def normals(tiny_config: ExperimentConfig, digit_shards: ShardSet) -> Pictures:
    """Thirty training images, enlarged to 32 x 32: what the detector calls normal."""
    return enlarged(next(split_batches(digit_shards, "train", tiny_config))[:30])


@pytest.fixture(scope="session")
def clip_pictures(normals: Pictures) -> Pictures:
    """Sixty frames: twenty-five normal ones, then thirty-five negatives."""
    return np.concatenate([normals[:25], 255 - np.concatenate([normals, normals[:5]])])


@pytest.fixture(scope="session")
def clip(clip_pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:func:`clip_pictures` at 25 frames a second: negatives from 1 s to the end, 2.4 s."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mkv", clip_pictures)


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    return write_clip


def enlarged(images: Tensor) -> Pictures:
    return to_uint8(images)[:, :, :, 0].repeat(4, axis=1).repeat(4, axis=2)
