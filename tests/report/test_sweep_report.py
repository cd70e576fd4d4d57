"""The report of a sweep says what its rows say: what matters, what does not, what survives; and stands alone."""

import math

import numpy as np

from raydiff.sweep_records import (
    Final,
    Refit,
    Setting,
    StepLoss,
    TrainingRow,
    append_settings,
    append_trainings,
    write_final,
)

SCHEDULES = {"linear": 0.0, "scaled_linear": 0.02, "sigmoid": 0.06, "squaredcos_cap_v2": 0.10}
SPACE = {
    "title": "Noise schedules on a formula",
    "parameters": {
        "schedule.beta_schedule": {"choices": list(SCHEDULES)},
        "schedule.num_train_timesteps": {"int": [50, 1000], "log": True},
        "schedule.beta_end": {
            "float": [1e-3, 1e-1],
            "log": True,
            "when": {"schedule.beta_schedule": ["linear", "scaled_linear"]},
        },
        "training.weight_decay": {"float": [0.0, 0.1]},
        "scoring.start": {"float": [0.05, 0.5]},
        "scoring.num_inference_steps": {"int": [1, 16], "log": True},
        "scoring.pooling": {"choices": ["mean", "max", "top_k"]},
        "calibration.target_fpr": {"choices": [0.01, 0.05, 0.1]},
    },
    "trials": 40,
    "seeds": [0, 1],
    "refit_seeds": [100, 101, 102],
}
NO_EFFECT = "training.weight_decay"


def noise_of(seed, *more):
    return float(np.random.default_rng([seed, *more]).normal())


def auroc(params, seed, run):
    """The schedule's family matters most, then where scoring starts; weight decay not at all."""
    value = 0.80 + SCHEDULES[params["schedule.beta_schedule"]]
    value += 0.01 * math.log10(params["schedule.num_train_timesteps"] / 50)
    value -= 0.25 * (params["scoring.start"] - 0.2) ** 2 / 0.3**2 * 0.15
    value += {"mean": 0.0, "max": 0.004, "top_k": 0.008}[params["scoring.pooling"]]
    value += 0.002 * math.log2(params["scoring.num_inference_steps"])
    return value + 0.004 * noise_of(seed, run)


def drawn(rng, paths):
    every = {
        "schedule.beta_schedule": str(rng.choice(list(SCHEDULES))),
        "schedule.num_train_timesteps": round(50 * 20 ** rng.random()),
        "schedule.beta_end": 1e-3 * 100 ** rng.random(),
        "training.weight_decay": 0.1 * rng.random(),
        "scoring.start": 0.05 + 0.45 * rng.random(),
        "scoring.num_inference_steps": round(16 ** rng.random()),
        "scoring.pooling": str(rng.choice(["mean", "max", "top_k"])),
        "calibration.target_fpr": float(rng.choice([0.01, 0.05, 0.1])),
    }
    params = {path: every[path] for path in paths}
    if params.get("schedule.beta_schedule") not in ("linear", "scaled_linear", None):
        params.pop("schedule.beta_end", None)
    return params


def measured(params, seed, run):
    target = params["calibration.target_fpr"]
    return {
        "selection_auroc": auroc(params, seed, run),
        "nfe": float(params["scoring.num_inference_steps"]),
        "realised_fpr": round(200 * target * (1 + 0.2 * noise_of(seed, run, 1))) / 200,
        "detection_rate": min(1.0, 0.3 + 2 * target),
    }


def setting(params, run, seeds, **more):
    by_seed = {seed: measured(params, seed, run) for seed in seeds}
    means = {name: float(np.mean([v[name] for v in by_seed.values()])) for name in by_seed[seeds[0]]}
    more = {"phase": "search", "trial": run, "training": f"key{run:03d}"} | more
    return Setting(params=params, values=means, by_seed=by_seed, num_normal=200,
                   target_fpr=params["calibration.target_fpr"], **more)  # fmt: skip


def training(params, run, seed, state="complete", **more):
    quality = SCHEDULES[params["schedule.beta_schedule"]]
    steps = tuple(
        StepLoss(t, 6 - 14 * t, 0.05 + 0.4 * (1 - t), (0.01 + 0.5 * t) * (1.5 - 4 * quality))
        for t in np.linspace(0.02, 0.98, 13).tolist()
    )
    row = {"key": f"key{run:03d}", "phase": "search", "trial": run, "params": params, "seed": seed, "state": state,
           "seconds": 20.0 + run % 5, "steps": 300, "loss": 0.3 - quality + 0.02 * noise_of(seed, run, 2),
           "trial_seconds": 23.0, "by_step": steps if state == "complete" else ()} | more  # fmt: skip
    return TrainingRow(**row)


def make_sweep(out, space, *, trials=40, each=20, final=True, around=True):
    """Rows of a whole sweep: some trainings pruned, one failed and one failed and then repeated."""
    rng = np.random.default_rng(0)
    weights, rest = space.paths(("training",)), space.paths(("evidence", "judgement"))
    trainings, settings = [], []
    for run in range(trials):
        params = drawn(rng, weights)
        state = "failed" if run == 7 else "pruned" if run % 9 == 5 else "complete"
        failure = "Traceback ...\nTrainingError: the loss is nan at step 12" if state == "failed" else ""
        if run == 3:
            trainings.append(training(params, run, 0, "failed", failure="Traceback ...\nOSError: gone", loss=None))
        trainings += [training(params, run, seed, state, failure=failure) for seed in space.seeds]
        if state == "complete":
            settings += [setting(params | drawn(rng, rest), run, list(space.seeds)) for _ in range(each)]
    best = max(settings, key=lambda row: row.values["selection_auroc"])
    if around:
        settings += make_around(space, best.params)
    append_trainings(out, trainings)
    append_settings(out, settings)
    if final:
        write_final(out, make_final(best, len(settings)))


def make_around(space, best):
    more = {"phase": "around", "trial": None, "training": "around"}
    rows = [setting(best, 900, [0, 1, 2], **more)]
    for path in best:
        parameter = space.parameters[path]
        values = parameter.choices or tuple(np.geomspace(*parameter.range, 5) if parameter.log
                                            else np.linspace(*parameter.range, 5))  # fmt: skip
        values = [round(v) if parameter.int else v if parameter.choices else float(v) for v in values]
        rows += [setting({**best, path: value}, 901 if parameter.choices else 902 + i, [0, 1, 2], varied=path, **more)
                 for i, value in enumerate(values) if value != best[path]]  # fmt: skip
    return rows


def make_final(best, num_settings):
    def refit(seed, shift):
        targets = (0.01, 0.05, 0.1)
        rates = tuple({"target_fpr": t, "realised_fpr": 1.6 * t, "realised_tpr": 0.25 + 2 * t} for t in targets)
        value = 0.88 + shift + 0.005 * noise_of(seed)
        test = {"auroc": value - 0.05, "average_precision": value, "realised_fpr": 0.08, "realised_tpr": 0.5,
                "target_fpr": 0.05, "num_test_normal": 150.0, "num_test_anomalous": 90.0}  # fmt: skip
        return Refit(seed, {"selection_auroc": value}, test, rates)

    return Final(best.params, best.values, tuple(refit(seed, 0.015) for seed in (100, 101, 102)),
                 tuple(refit(seed, 0.0) for seed in (100, 101, 102)), 40, num_settings, {"trial": 12})  # fmt: skip
