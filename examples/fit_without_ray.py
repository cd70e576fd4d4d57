"""The whole way in one process, without Ray: shards, training, calibration, a verdict with its p-value.

    python examples/fit_without_ray.py [STEPS]

It takes 400 steps by default.
"""

import sys
import tempfile
from pathlib import Path

from raydiff.experiment import fit_locally, split_batches
from raydiff.recipes import digits
from raydiff.shards import write_shards
from raydiff.tracking import progress_line

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
config = digits(normal="8").override({"training.num_steps": steps, "training.log_every": max(1, steps // 4)})
with tempfile.TemporaryDirectory() as folder:
    shards = write_shards(config.data, f"{folder}/shards")
    detector = fit_locally(
        config,
        Path(folder),
        shards,
        on_metrics=lambda line: print(progress_line(line, steps, config.training.batch_size)),
    )
    images = next(split_batches(shards, "test", config))[:8]  # digits 0 to 9 in turn; only 8 is normal
    prediction = detector.predict(images)

assert detector.calibration is not None
print(f"threshold {detector.calibration.threshold.value:.3f}: {detector.calibration.threshold.rule}")
for score, p_value, verdict in zip(prediction.pred_score, prediction.p_value, prediction.pred_label, strict=True):
    print(f"score {score:8.3f}   p-value {p_value:.3f}   {'anomalous' if verdict else 'normal'}")
