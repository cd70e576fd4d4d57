"""The drawn parts in examples/: a data set that raydiff reads, with masks where the defects are, the same each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from raydiff.config import ExperimentConfig
from raydiff.images import ImageSpec, decode_file
from raydiff.shards import write_shards

SCRIPT = Path(__file__).parents[1] / "examples" / "nails.py"


def test_drawn_nails_are_a_data_set_of_parts_at_any_angle(tmp_path: Path) -> None:
    for name in ("nails", "again"):
        subprocess.run([sys.executable, SCRIPT, tmp_path / name], check=True, capture_output=True)
    nails = tmp_path / "nails"
    files = sorted(path.relative_to(nails) for path in nails.rglob("*.png"))
    assert all((nails / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files)
    config = ExperimentConfig().override([
        f"data.dataset={{name: folder, source: {nails}}}", "data.image_size=[96, 256]", "data.align=principal_axis",
    ])  # fmt: skip
    shards = write_shards(config.data, str(tmp_path / "shards"))
    assert [shards.count(split) for split in ("train", "calibration", "test")] == [90, 30, 60]
    spec = ImageSpec.of(config.data)
    for path in sorted((nails / "train" / "good").iterdir())[:10]:
        placement = decode_file(path.read_bytes(), spec, path.name).placement
        assert placement.pose is not None
        assert placement.is_whole
    for mask in sorted((nails / "ground_truth").rglob("*.png")):
        bad = np.asarray(Image.open(nails / "test" / mask.parent.name / mask.name.replace("_mask", "")), dtype=float)
        marked = np.asarray(Image.open(mask)) > 127
        assert 20 < marked.sum() < 400
        assert bad[marked].mean() > 110  # the ground or bare metal shows where the nail was darker
