"""A finite search space in which everything is known: what ``benchmarks.sweep_search`` searches.

90 tiny networks on one digit, each measured under 216 scorings on the selection split.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydiff.config import ExperimentConfig
from raydiff.journal import write_whole
from raydiff.recipes import digits
from raydiff.search_space import Level, SearchSpace
from raydiff.sweep.jobs import SCORING, TRAINING, Job, train_networks

DIGIT = "8"
BASE = {
    "training.num_steps": 150, "training.batch_size": 32, "training.ema_decay": 0.98, "training.validate_every": 150,
    "training.checkpoint_every": 150, "training.warmup_steps": 20, "training.learning_rate": 3e-3,
    "denoiser": {"name": "convnet", "width": 24, "num_blocks": 2, "kernel_size": 5},
}  # fmt: skip
PARAMETERS = {
    "schedule.beta_schedule": {"choices": ["linear", "squaredcos_cap_v2", "sigmoid"]},
    "schedule.beta_end": {"choices": [0.02, 0.1], "when": {"schedule.beta_schedule": ["linear", "sigmoid"]}},
    "schedule.num_train_timesteps": {"choices": [50, 200, 1000]},
    "objective.prediction_type": {"choices": ["epsilon", "sample", "v_prediction"]},
    "objective.loss_weighting": {"choices": ["uniform", "min_snr"]},
    "scoring.start": {"choices": [0.02, 0.1, 0.2]},
    "scoring.stop": {"choices": [0.4, 0.8]},
    "scoring.num_inference_steps": {"choices": [2, 8]},
    "scoring.pooling": {"choices": ["mean", "max", "top_k"]},
    "scoring.normalise": {"choices": ["none", "step", "pixel"]},
    "scoring.blur": {"choices": [0.0, 1.0]},
}

Params = Mapping[str, Any]


def the_space(sampler: str, seed: int = 0) -> SearchSpace:
    content = {"base": BASE, "parameters": PARAMETERS, "sampler": sampler, "sampler_seed": seed}
    return SearchSpace.model_validate(content)


def the_config() -> ExperimentConfig:
    """Half of the normal images calibrate: with the recipe's quarter, 29, values would lie 0.0012 apart."""
    return digits(DIGIT).override({"data.calibration_fraction": 0.5, "execution.num_workers": 1})


def combinations(space: SearchSpace, levels: Collection[Level]) -> list[dict[str, Any]]:
    """All of them; a parameter whose condition does not hold is absent."""
    found: list[dict[str, Any]] = [{}]
    for path in space.paths(levels):
        found = [
            {**one, path: value} if value is not None else one
            for one in found
            for value in (space.parameters[path].choices or () if space.applies(path, one) else (None,))
        ]
    return found


def text(params: Params) -> str:
    return json.dumps(dict(params), sort_keys=True)


@dataclass
class Table:
    """What every training is worth under every scoring, on the selection split."""

    out: Path
    shards: str
    config: ExperimentConfig
    jobs: dict[str, Job] = field(default_factory=dict)
    """By :func:`text` of the training's parameters."""
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    """By training, then by :func:`text` of the scoring's parameters."""
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """Per training: that took, and measuring all its settings took."""

    def fill(self) -> None:
        """Train and measure what is missing."""
        space = the_space("random")
        scorings = combinations(space, SCORING)
        trainings = combinations(space, TRAINING)
        for number, params in enumerate(trainings, 1):
            job = Job(self.out, self.shards, space, self.config, params, (0,))
            path = job.folder / "table.json"
            if not path.exists():
                write_whole(path, json.dumps(measured(job, scorings)))
                print(f"training {number} of {len(trainings)} done", flush=True)
            row = json.loads(path.read_text(encoding="utf-8"))
            self.jobs[text(params)], self.values[text(params)] = job, row["values"]
            self.seconds.append((row["training"], row["settings"]))


def measured(job: Job, scorings: Sequence[Params]) -> dict[str, Any]:
    """One row of the table, with the CPU seconds that it took."""
    begun = time.process_time()
    networks = train_networks(job)
    trained = time.process_time()
    values = {text(one): networks.measure({**job.params, **one}).values["selection_auroc"] for one in scorings}
    return {"values": values, "training": trained - begun, "settings": time.process_time() - trained}
