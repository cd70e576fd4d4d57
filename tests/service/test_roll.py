"""Rolling, rolling back and shadows: whole or not at all, and never in the way of an answer."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from torch import Tensor

from raydiff.config import ExperimentConfig
from raydiff.config.options import component_options
from raydiff.detector import BaselineDetector, DiffusionDetector
from raydiff.errors import ArtifactError, ConfigError
from raydiff.images import encode_png, to_uint8
from raydiff.service import Limits, ProblemError, ScoredImage, ScoringService
from raydiff.service.artifacts import LoadedArtifact, load_artifact
from raydiff.service.roll import Roll
from raydiff.service.shadow import Shadow
from raydiff.testing import small_images


@pytest.fixture(scope="module")
def first(run_dir: Path) -> Path:
    return run_dir / "artifact"


@pytest.fixture(scope="module")
def second(detector: DiffusionDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with a threshold for another rate: other verdicts, equal scores."""
    path = tmp_path_factory.mktemp("second") / "artifact"
    detector.with_target_fpr(0.5).save(path)
    return path


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another detector at another size, without a reconstruction: a baseline on 12 x 12 pixels."""
    path = tmp_path_factory.mktemp("larger") / "artifact"
    config = ExperimentConfig().override({"data.image_size": [12, 12]})
    images = small_images(120, (12, 12))
    detector = BaselineDetector.fit(config, component_options("baselines", "knn"), images[:80])
    detector.calibrate(images[80:]).save(path)
    return path


@pytest.fixture(scope="module")
def files(digit_images: Tensor) -> list[bytes]:
    return [encode_png(pixels) for pixels in to_uint8(digit_images)]


def answers(service: ScoringService, files: list[bytes]) -> list[ScoredImage]:
    found = service.score([service.receive(data) for data in files])
    assert all(isinstance(answer, ScoredImage) for answer in found)
    return [answer for answer in found if isinstance(answer, ScoredImage)]


def test_roll_and_roll_back(first: Path, second: Path, files: list[bytes]) -> None:
    service = ScoringService(first)
    old = service.artifact_id
    with pytest.raises(ProblemError, match="No other artefact was live") as caught:
        service.roll_back()
    assert caught.value.status == 409
    new = service.roll(second)
    assert new != old
    assert {answer.artifact_id for answer in answers(service, files)} == {new}
    assert service.model()["previous_artifact_id"] == old
    assert service.roll(second) == new
    assert service.model()["previous_artifact_id"] == old  # the live one again changes nothing
    assert service.roll_back() == old
    assert service.roll_back() == new


def test_a_broken_artefact_leaves_the_old_one_live(first: Path, files: list[bytes], tmp_path: Path) -> None:
    service = ScoringService(first)
    before = [answer.score for answer in answers(service, files)]
    shutil.copytree(first, tmp_path / "broken")
    (tmp_path / "broken" / "calibration.json").write_bytes(b"{}")
    for path, why in ((tmp_path / "broken", "calibration.json: is truncated"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ArtifactError, match=why):
            service.roll(path)
        with pytest.raises(ArtifactError, match=why):
            service.set_shadow(path)
    assert [answer.score for answer in answers(service, files)] == before
    assert service.model()["previous_artifact_id"] is service.model()["shadow"] is None


def test_a_rate_that_was_set_outlives_a_roll(first: Path, second: Path, files: list[bytes]) -> None:
    service = ScoringService(first)
    own = answers(service, files)[0].threshold
    service.set_target_fpr(0.2)
    service.roll(second)
    assert answers(service, files)[0].target_fpr == 0.2
    service.set_target_fpr(None)
    assert answers(service, files)[0].target_fpr == 0.5
    service.roll_back()
    assert answers(service, files)[0].threshold == own


def test_an_image_received_before_a_roll_is_scored_after_it(first: Path, larger: Path, files: list[bytes]) -> None:
    """The new artefact works at another size: the image is decoded again from its bytes."""
    service = ScoringService(first)
    received = [service.receive(data) for data in files]
    service.roll(larger)
    expected = [answer.score for answer in answers(service, files)]
    late = service.score(received, explain=True)
    assert [answer.score for answer in late if isinstance(answer, ScoredImage)] == expected
    explanation = late[0].explanation if isinstance(late[0], ScoredImage) else None
    assert explanation is not None
    assert not service.model()["has_reconstruction"]
    assert explanation.pictures.reconstruction is None


def test_rolling_under_load_drops_nothing(first: Path, second: Path, larger: Path, files: list[bytes]) -> None:
    services = {path: ScoringService(path) for path in (first, second, larger)}
    expected = {made.artifact_id: [a.score for a in answers(made, files)] for made in services.values()}
    service = ScoringService(first)

    def work(_: int) -> list[tuple[str, list[float]]]:
        found = []
        for _ in range(6):
            given = answers(service, files)
            assert len({answer.artifact_id for answer in given}) == 1
            found.append((given[0].artifact_id, [answer.score for answer in given]))
        return found

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(work, i) for i in range(4)]
        for path in (second, larger, first, larger):
            service.roll(path)
        service.roll_back()
        results = [pair for job in jobs for pair in job.result()]
    assert len(results) == 24
    assert all(scores == expected[artifact_id] for artifact_id, scores in results)


def test_a_shadow_is_recorded_and_never_answers(first: Path, second: Path, files: list[bytes]) -> None:
    service, alone = ScoringService(first, min_drift_scores=5), ScoringService(second)
    plain = answers(service, files)
    service.set_shadow(second, share=1.0)
    assert [(a.score, a.verdict, a.artifact_id) for a in answers(service, files)] == [
        (a.score, a.verdict, a.artifact_id) for a in plain
    ]
    report = service.shadow_report(wait=True)
    assert report is not None
    assert json.dumps(report)
    other = answers(alone, files)
    agreeing = sum(a.verdict == b.verdict for a, b in zip(plain, other, strict=True))
    assert (report["artifact_id"], report["num_scored"]) == (alone.artifact_id, len(files))
    assert report["agreement"] == agreeing / len(files) < 1
    assert report["mean_p_value_difference"] == report["mean_absolute_p_value_difference"] == 0  # equal scores
    assert report["last"]["image"] == plain[-1].image
    assert b"raydiff_shadow_scored 20.0" in service.metrics()
    service.close()
    assert service.shadow_report() is None


def test_a_shadow_may_work_at_another_size(first: Path, larger: Path, files: list[bytes]) -> None:
    service = ScoringService(first)
    service.set_shadow(larger, share=1.0)
    answers(service, files)
    report = service.shadow_report(wait=True)
    service.close()
    expected = answers(ScoringService(larger), files)
    assert report is not None
    assert (report["num_scored"], report["num_failed"]) == (len(files), 0)
    assert report["last"]["score"] == expected[-1].score
    assert report["mean_absolute_p_value_difference"] > 0


def test_the_share_is_of_images_and_always_the_same(first: Path, second: Path) -> None:
    service = ScoringService(first)
    rng = np.random.default_rng(0)
    received = [service.receive(encode_png(rng.integers(0, 256, (8, 8), dtype=np.uint8))) for _ in range(200)]
    service.set_shadow(second, share=0.25)
    shadow = service._roll.lineup.shadow
    assert shadow is not None
    taken = {image.digest for image in received if shadow.takes(image.digest)}
    assert 25 < len(taken) < 75
    for part in (received[:30], received[:30]):
        service.score(part)
        shadow.wait()
    recorded = [record.image for record in shadow.records()]
    expected = [image.digest for image in received[:30] if image.digest in taken]
    assert recorded == expected * 2
    service.close()
    service.set_shadow(second, share=1.0)
    closed = service._roll.lineup.shadow
    assert closed is not None
    service.score(received)
    service.close()  # leaves out what waits
    report = closed.report()
    assert report["num_scored"] + report["num_left_out"] == len(received)
    assert report["num_left_out"] > 0
    for share in (0, 1.5, float("nan"), True):
        with pytest.raises(ConfigError, match="share"):
            service.set_shadow(second, share=share)


def test_a_shadow_that_fails_or_cannot_keep_up_harms_nobody(
    first: Path, detector: DiffusionDetector, files: list[bytes], tmp_path: Path
) -> None:
    """Statistics of another shape: real errors in the shadow's thread. And a queue of one."""
    service = ScoringService(first)
    artifact = service._roll.lineup.live
    broken = replace(detector, statistics={k: torch.zeros(1, 5, 5) for k in detector.statistics})
    shadow = Shadow(replace(artifact, detector=broken), 1.0, max_pending=1)
    service._roll._lineup = replace(service._roll.lineup, shadow=shadow)
    assert len(answers(service, files)) == len(files)
    report = service.shadow_report(wait=True)
    assert report is not None
    assert report["num_scored"] == 0
    assert report["num_failed"] + report["num_left_out"] == len(files)
    assert report["num_failed"] > 0
    assert report["num_left_out"] > 0
    assert report["agreement"] is None
    service.close()
    shadow.offer(service.receive(files[0]), {})
    assert shadow._pending_bytes == 0
    shadow.wait()
    assert report == shadow.report()


def test_nothing_that_goes_wrong_ends_the_shadow(
    first: Path, larger: Path, files: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    received = ScoringService(first).receive(files[0])
    said = {"live_artifact_id": "1", "live_score": 0.0, "live_p_value": 0.5, "live_is_anomaly": False}
    shadow = Shadow(load_artifact(larger, max_batch=1), 1.0, limits=Limits(max_bytes=len(files[0])))
    shadow.offer(replace(received, data=received.data + b"more"), said)  # more than an image may have
    for _ in range(3):
        shadow.offer(received, {})  # a TypeError
    shadow.offer(received, said)
    shadow.wait()
    assert (shadow.report()["num_failed"], shadow.report()["num_scored"]) == (4, 1)
    logged = [record for record in caplog.records if record.name == "raydiff.service.shadow"]
    assert len(logged) == 2  # one of each kind, with its traceback
    assert all(record.exc_info for record in logged)
    shadow.close()


def test_a_rate_can_be_set_while_an_artefact_loads(first: Path, second: Path) -> None:
    loading, go = Event(), Event()

    def load(folder: str | Path) -> LoadedArtifact:
        if folder == second:
            loading.set()
            assert go.wait(20)
        return load_artifact(folder, max_batch=1)

    roll = Roll(first, load)
    with ThreadPoolExecutor(2) as pool:
        rolled = pool.submit(roll.roll, second)
        try:
            assert loading.wait(20)
            changed = pool.submit(roll.set_target_fpr, 0.2).result(timeout=20)
            assert roll.lineup.live is changed
        finally:
            go.set()
        live = rolled.result()
    assert live is roll.lineup.live
    assert live.own_target_fpr == 0.5
    assert live.calibration.threshold.target_fpr == 0.2
    assert roll.lineup.previous is changed
