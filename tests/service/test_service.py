"""The service: scores of ``raydiff score`` bit for bit, from any thread and batch; explanations, rates, metrics."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from raydiff.batch import score_files
from raydiff.contracts import Scores
from raydiff.core.metrics import Estimate
from raydiff.detector import DiffusionDetector, load_detector
from raydiff.errors import ArtifactError, ConfigError, NotCalibratedError, ScoreError
from raydiff.images import encode_png, to_uint8
from raydiff.results import Result, append_results
from raydiff.service import CONTENT_TYPE, Limits, ProblemError, ScoredImage, ScoringService
from raydiff.testing import planted_defect


@pytest.fixture(scope="module")
def artifact(run_dir: Path) -> Path:
    return run_dir / "artifact"


@pytest.fixture(scope="module")
def service(artifact: Path) -> Iterator[ScoringService]:
    made = ScoringService(artifact, max_batch=8)
    yield made
    made.close()


@pytest.fixture(scope="module")
def files(digit_images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Digits and broken digits as files of several formats and sizes, by path in sorted order."""
    folder = tmp_path_factory.mktemp("files")
    images = torch.cat([digit_images[:10], planted_defect(digit_images[10:])[0]])
    for i, pixels in enumerate(to_uint8(images)):
        kind = ("png", "jpeg", "webp", "bmp", "tiff")[i % 5]
        Image.fromarray(pixels[:, :, 0]).resize((8 + 5 * i, 8 + 3 * i)).save(folder / f"{i:02}.{kind}")
    return {str(path): path.read_bytes() for path in sorted(folder.iterdir())}


def scored(answers: list[Any]) -> list[ScoredImage]:
    assert all(isinstance(answer, ScoredImage) for answer in answers)
    return answers


def test_it_says_what_scoring_the_files_says(
    service: ScoringService, artifact: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    score_files(load_detector(artifact), list(files), tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = scored(service.score([service.receive(data) for data in files.values()]))
    assert [row["path"] for row in rows] == list(files)
    for row, answer in zip(rows, answers, strict=True):
        assert (row["score"], row["p_value"], row["threshold"]) == (answer.score, answer.p_value, answer.threshold)
        assert row["is_anomaly"] == (answer.verdict == "anomalous")
    assert {answer.verdict for answer in answers} == {"normal", "anomalous"}


def test_scores_do_not_depend_on_batch_mates_threads_or_order(service: ScoringService, files: dict[str, bytes]) -> None:
    received = [service.receive(data) for data in files.values()]
    expected = [answer.score for answer in scored(service.score(received))]
    assert [scored(service.score([image]))[0].score for image in received] == expected
    assert [answer.score for answer in scored(service.score(received[::-1]))][::-1] == expected

    def job(start: int) -> list[float]:
        order = [(start + i) % len(received) for i in range(len(received))]
        answers = scored(service.score([received[i] for i in order], explain=start % 2 == 0))
        by_index = dict(zip(order, answers, strict=True))
        return [by_index[i].score for i in range(len(received))]

    with ThreadPoolExecutor(4) as pool:
        assert all(scores == expected for scores in pool.map(job, range(8)))


def test_an_answer_is_json(service: ScoringService, files: dict[str, bytes]) -> None:
    received = [service.receive(data) for data in files.values()]
    most = max(range(len(received)), key=[answer.score for answer in scored(service.score(received))].__getitem__)
    plain, explained = service.score([received[most]] * 2, explain=[False, True])
    assert isinstance(plain, ScoredImage)
    assert isinstance(explained, ScoredImage)
    assert plain.explanation is None
    assert set(plain.timing_ms) == {"decode", "score"}
    assert set(explained.timing_ms) == {"decode", "score", "explain"}
    assert plain.batch_size == 2
    file_format = Path(list(files)[most]).suffix[1:]
    assert (plain.artifact_id, plain.format, plain.width) == (service.artifact_id, file_format, 8 + 5 * most)
    sent = json.loads(json.dumps(explained.to_dict(), allow_nan=False))
    assert sent["verdict"] == "anomalous"
    middle = sent["explanation"]["heat_scale"]["middle"]
    assert middle == service.model()["calibration"]["mask_threshold"]
    assert all(box["peak"] > middle for box in sent["explanation"]["boxes"])
    pictures = sent["explanation"]["pictures"]
    shapes = {name: Image.open(io.BytesIO(base64.b64decode(picture))) for name, picture in pictures.items()}
    assert {name: (image.mode, image.size) for name, image in shapes.items()} == {
        "heat_map": ("RGB", (128, 128)), "heat_layer": ("RGBA", (128, 128)), "reconstruction": ("L", (128, 128)),
    }  # fmt: skip


def test_one_explain_for_each_or_for_all(service: ScoringService, files: dict[str, bytes]) -> None:
    received = service.receive(next(iter(files.values())))
    with pytest.raises(ConfigError, match="explain has 1 values for 2 images"):
        service.score([received, received], explain=[True])
    assert service.score([]) == []


def test_the_model_says_what_it_is_and_not_where(service: ScoringService, run_dir: Path) -> None:
    model = service.model()
    text = json.dumps(model, allow_nan=False)
    assert str(run_dir.parent) not in text
    assert model["artifact_id"] == service.artifact_id
    assert model["has_maps"]
    assert model["has_reconstruction"]
    assert model["image"] == {
        "height": 8, "width": 8, "channels": 1, "resize": "stretch", "aligned_width": None, "max_pixels": 64_000_000,
    }  # fmt: skip
    histogram = model["calibration"]["histogram"]
    assert sum(histogram["counts"]) == model["calibration"]["threshold"]["num_images"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert model["training_data_digest"] == load_detector(run_dir / "artifact").provenance["data_digest"]
    assert model["config"]["scoring"]["name"] == "denoising_error"
    assert model["metrics"] is None
    assert model["previous_artifact_id"] is model["shadow"] is None


def test_metrics_of_this_very_artefact_are_found(artifact: Path, service: ScoringService, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "artifact")
    row = Result(
        run="a", detector="unet/denoising_error", dataset="digits", seed=0, subset="all", subset_kind="all",
        num_normal=20, num_anomalous=10, metrics={"auroc": Estimate(0.9, 0.8, 0.95)}, threshold=0.5, target_fpr=0.05,
        realised_fpr=Estimate(0.1), realised_tpr=Estimate(0.8), num_evaluations=8, ms_per_image_alone=2.5,
        ms_per_image=0.4, batch_size=64, device="cpu", hardware="a processor", versions={}, commit=None,
        command="raydiff evaluate /home/me/run", created="2026-01-01T00:00:00+00:00", config_digest="c",
        artifact_digest=service.artifact_id, data_digest="d",
    )  # fmt: skip
    results = tmp_path / "results.jsonl"
    append_results(results, [row])
    found = ScoringService(tmp_path).model()["metrics"]
    assert found["metrics"]["auroc"] == {"value": 0.9, "low": 0.8, "high": 0.95}
    assert "command" not in found
    results.unlink()
    append_results(results, [row.model_copy(update={"artifact_digest": "0" * 64})])
    assert ScoringService(tmp_path).model()["metrics"] is None
    results.write_text("no json")
    assert ScoringService(tmp_path).model()["metrics"] is None


def test_a_rate_takes_effect_with_the_next_call(artifact: Path, files: dict[str, bytes]) -> None:
    service = ScoringService(artifact)
    received = [service.receive(data) for data in files.values()]
    before = scored(service.score(received))
    threshold = service.set_target_fpr(0.5)
    assert (threshold["target_fpr"], threshold["num_images"]) == (0.5, len(load_detector(artifact).calibration.scores))
    assert json.dumps(threshold)
    after = scored(service.score(received))
    assert {answer.threshold for answer in after} == {threshold["value"]}
    assert after[0].target_fpr == 0.5
    assert [answer.score for answer in after] == [answer.score for answer in before]
    flagged = [sum(answer.verdict == "anomalous" for answer in answers) for answers in (before, after)]
    assert flagged[1] > flagged[0]
    expected = load_detector(artifact).with_target_fpr(0.5).calibration
    assert expected is not None
    assert threshold["value"] == expected.threshold.value
    service.set_target_fpr(None)
    assert scored(service.score(received[:1]))[0].threshold == before[0].threshold


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2, float("nan"), float("inf"), True, "0.1", [0.1]])
def test_a_rate_that_cannot_be_is_refused(service: ScoringService, rate: Any) -> None:
    before = service.model()["calibration"]
    with pytest.raises(ProblemError, match=r"between 0 and 1") as caught:
        service.set_target_fpr(rate)
    assert (caught.value.type, caught.value.status) == ("invalid-target-rate", 422)
    assert service.model()["calibration"] == before


def test_rates_change_while_threads_score(artifact: Path, files: dict[str, bytes]) -> None:
    """Every answer is of one piece: its threshold is that of its rate."""
    service = ScoringService(artifact)
    received = [service.receive(data) for data in list(files.values())[:3]]
    rates = (0.05, 0.2, 0.5)
    values = {rate: service.set_target_fpr(rate)["value"] for rate in rates}
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(service.score, received) for _ in range(12)]
        for i in range(30):
            service.set_target_fpr(rates[i % 3])
        for job in jobs:
            for answer in scored(job.result()):
                assert answer.threshold == values[answer.target_fpr]
                assert (answer.verdict == "anomalous") == (answer.score > answer.threshold)


@dataclass(frozen=True, eq=False, kw_only=True)
class DivergedOnWhite(DiffusionDetector):
    """A real detector whose score of a white image is not a number."""

    def _score(self, images: Tensor) -> Scores:
        scores = super()._score(images)
        return replace(scores, image=torch.where(images.flatten(1).amin(1) == 1, torch.nan, scores.image))


def test_an_image_without_a_score_spoils_no_other(
    artifact: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = ScoringService(artifact)
    good = [service.receive(data) for data in list(files.values())[:2]]
    expected = [answer.score for answer in scored(service.score(good))]
    white = service.receive(encode_png(np.full((8, 8), 255, np.uint8)))
    lineup = service._roll.lineup
    detector = DivergedOnWhite(**vars(lineup.live.detector))
    service._roll._lineup = replace(lineup, live=replace(lineup.live, detector=detector))
    first, problem, second = service.score([good[0], white, good[1]], explain=True)
    assert isinstance(problem, ProblemError)
    assert problem.type == "score-not-finite"
    assert [answer.score for answer in scored([first, second])] == expected


def test_a_refused_image_is_counted(artifact: Path, files: dict[str, bytes]) -> None:
    service = ScoringService(artifact, limits=Limits(max_bytes=100_000, max_pixels=100_000), max_batch=4)
    for bad in (b"", b"nonsense", bytes(100_001), encode_png(np.zeros((1000, 1000), np.uint8))):
        with pytest.raises(ProblemError):
            service.receive(bad)
    service.score([service.receive(data) for data in files.values()])
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(service.metrics().decode())
        for sample in family.samples
    }
    count = len(files)
    for kind, times in (("empty-body", 1), ("unsupported-format", 1), ("body-too-large", 1), ("too-many-pixels", 1),
                        ("damaged-image", 0)):  # fmt: skip
        assert samples["raydiff_problems_total", ("type", kind)] == times
    verdicts = [value for key, value in samples.items() if key[0] == "raydiff_images_total"]
    assert sum(verdicts) == count
    assert samples["raydiff_stage_seconds_count", ("stage", "decode")] == count
    assert samples["raydiff_batch_size_count",] == count / 4
    assert samples["raydiff_batch_size_sum",] == count
    assert samples["raydiff_p_value_count",] == count
    assert samples["raydiff_artifact_info", ("artifact", service.artifact_id[:12])] == 1
    assert samples["raydiff_drift_scores",] == count
    assert np.isnan(samples["raydiff_drift_ks",])
    artifact_id, scores = service.drift_scores()
    assert (artifact_id, len(scores)) == (service.artifact_id, count)
    assert service.drift().num_scores == count
    assert service.model()["limits"] == {"max_bytes": 100_000, "max_pixels": 100_000}
    assert "version=0.0.4" in CONTENT_TYPE


def test_it_notices_that_its_detector_is_spoilt(artifact: Path) -> None:
    service = ScoringService(artifact)
    before = service.metrics()
    service.set_target_fpr(0.3)
    service.check()
    service.set_target_fpr(None)
    assert service.metrics() == before
    with torch.no_grad():
        for weights in service._roll.lineup.live.detector.network.parameters():
            weights.mul_(0.5)
    with pytest.raises(ScoreError, match=r"a stored image scored .*; start the process again"):
        service.check()


def test_drift_of_scores_that_several_replicas_have(artifact: Path) -> None:
    service = ScoringService(artifact, min_drift_scores=10)
    calibration = load_detector(artifact).calibration
    assert calibration is not None
    same = calibration.scores.numpy().astype(np.float64)
    assert service.drift().num_scores == 0
    assert service.drift(same).claim == "stable"
    assert service.drift(same * 10).claim == "major shift"
    assert service.drift(same[:9]).claim == "too few scores"


def test_bad_artefacts_are_refused_with_the_remedy(artifact: Path, detector: DiffusionDetector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such folder"):
        ScoringService(tmp_path / "nowhere")
    replace(detector, calibration=None, statistics={}).save(tmp_path / "uncalibrated")
    with pytest.raises(NotCalibratedError, match=r"uncalibrated: has no threshold; calibrate"):
        ScoringService(tmp_path / "uncalibrated")
    shutil.copytree(artifact, tmp_path / "altered")
    with (tmp_path / "altered" / "weights.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x99\x99")
    with pytest.raises(ArtifactError, match=r"weights.safetensors: was altered"):
        ScoringService(tmp_path / "altered")
    with pytest.raises(ConfigError, match=r"device is 'tpu'"):
        ScoringService(artifact, device="tpu")
    with pytest.raises(ConfigError, match=r"max_batch is 0"):
        ScoringService(artifact, max_batch=0)


def test_a_diverged_artefact_does_not_go_live(detector: DiffusionDetector, tmp_path: Path) -> None:
    broken = replace(detector, statistics={k: torch.full_like(v, torch.nan) for k, v in detector.statistics.items()})
    broken.save(tmp_path / "broken")
    with pytest.raises(ArtifactError, match=r"loads but does not score .*; train it again"):
        ScoringService(tmp_path / "broken")
