"""One file says what the artefact says: scores, maps, verdicts, alone and in any batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from raydiff.config import ExperimentConfig, component_options
from raydiff.contracts import Scores
from raydiff.detector import DiffusionDetector
from raydiff.errors import ArtifactError, ConfigError, RaydiffError
from raydiff.exported import METADATA, TOLERANCE, ExportedDetector, load_exported
from raydiff.exporting import export
from raydiff.images import to_tensor, to_uint8
from raydiff.testing import small_images

FEATURES: dict[str, Any] = {
    "data.image_size": [32, 32], "data.channels": 3, "objective.prediction_type": "sample",
    "space": {"name": "feature", "backbone": "test_resnet", "weights": None, "levels": [0, 1], "grid": 8,
              "num_components": 12},
    "denoiser": {"name": "convnet", "width": 16, "num_blocks": 1},
    "scoring": {"name": "denoising_error", "num_inference_steps": 2, "blur": 0.7},
}  # fmt: skip


def on_grid(images: Tensor) -> Tensor:
    """As decoded files are: multiples of 1/255."""
    return to_tensor(to_uint8(images))


def trained_like(config: ExperimentConfig) -> DiffusionDetector:
    """A network that is no longer at its start, where outputs are zero; calibrated on small images."""
    detector = DiffusionDetector.create(config, num_classes=2)
    size, channels = config.data.image_size, config.data.channels
    if detector.space.num_fit_images:
        detector.space.fit(small_images(16, size, channels))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in detector.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return detector.calibrate(on_grid(small_images(20, size, channels, seed=1)))


@pytest.fixture(scope="module")
def feature_detector(tmp_path_factory: pytest.TempPathFactory) -> DiffusionDetector:
    """In the features of a tiny timm network with random weights."""
    import timm
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet").state_dict(), path)
    fields = {**FEATURES, "space": {**FEATURES["space"], "weights": str(path)}}
    return trained_like(ExperimentConfig().override(fields))


def agree(detector: DiffusionDetector, exported: ExportedDetector, images: Tensor) -> None:
    assert detector.calibration is not None
    expected, found = detector.predict(images), exported.predict(images)
    unit = torch.maximum(expected.pred_score.abs(), detector.calibration.scores.std().float())
    assert float(((found.pred_score - expected.pred_score).abs() / unit).max()) <= TOLERANCE
    assert expected.anomaly_map is not None
    assert found.anomaly_map is not None
    scale = float(expected.anomaly_map.abs().max())
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-4 * scale)
    near = (expected.pred_score - detector.calibration.threshold.value).abs() <= TOLERANCE * unit
    assert bool((near | (found.pred_label == expected.pred_label)).all())
    assert exported.calibration is not None
    assert exported.calibration.threshold == detector.calibration.threshold
    for rows in (images[:1], images[:2], images.repeat(4, 1, 1, 1)):  # any batch
        again = exported.score(rows).image[:1]
        torch.testing.assert_close(again, found.pred_score[:1], rtol=1e-4, atol=1e-4 * float(unit[0]))


@pytest.fixture(scope="module")
def onnx_file(detector: DiffusionDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "digits.onnx"
    assert export(detector, path).difference <= TOLERANCE
    return path


def test_a_unet_in_pixels_as_onnx(onnx_file: Path, detector: DiffusionDetector, digit_images: Tensor) -> None:
    exported = load_exported(onnx_file)
    agree(detector, exported, on_grid(digit_images))
    assert exported.name == "unet/denoising_error (onnx)"
    assert exported.num_evaluations == detector.num_evaluations
    assert exported.artifact_digest == detector.artifact_digest
    assert exported.image_spec == detector.image_spec
    assert exported.with_target_fpr(0.2).calibration != exported.calibration


@pytest.mark.slow
def test_a_unet_in_pixels_as_a_torch_program(detector: DiffusionDetector, digit_images: Tensor, tmp_path: Path) -> None:
    export(detector, tmp_path / "digits.pt2", "torch")
    exported = load_exported(tmp_path / "digits.pt2")
    agree(detector, exported, on_grid(digit_images))
    assert exported.name == "unet/denoising_error (torch)"


@pytest.mark.parametrize("ending", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_features_and_what_follows_them_are_in_the_file(
    feature_detector: DiffusionDetector, tmp_path: Path, ending: str
) -> None:
    export(feature_detector, tmp_path / f"features.{ending}")
    agree(
        feature_detector, load_exported(tmp_path / f"features.{ending}"), on_grid(small_images(5, (32, 32), 3, seed=2))
    )


DIT: dict[str, Any] = {
    "denoiser": {"name": "dit", "depth": 1, "hidden_size": 16, "num_heads": 2}, "objective.condition": "class",
    "scoring": {"name": "denoising_error", "num_inference_steps": 2},
}  # fmt: skip
DENSITY = {"start": "clean", "density": "mahalanobis"}
NORMS = {"scoring": {"name": "score_norms", "num_inference_steps": 2}, "objective.prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(DIT, id="dit with classes"),
        pytest.param(
            {"scoring": {"name": "reconstruction", "num_inference_steps": 2}},
            id="reconstruction",
            marks=pytest.mark.slow,
        ),
        pytest.param({"scoring": {"name": "reconstruction", **DENSITY}}, id="density", marks=pytest.mark.slow),
        pytest.param(NORMS, id="score norms", marks=pytest.mark.slow),
    ],
)
def test_other_scorers_and_networks(fields: dict[str, Any], tiny_config: ExperimentConfig, tmp_path: Path) -> None:
    detector = trained_like(tiny_config.override(fields))
    export(detector, tmp_path / "other.pt2")
    agree(detector, load_exported(tmp_path / "other.pt2"), on_grid(small_images(4, seed=3)))


def test_a_file_is_enough_without_raydiff(onnx_file: Path, detector: DiffusionDetector, digit_images: Tensor) -> None:
    """What README tells others: the input's shape and type, the outputs, the threshold in the metadata."""
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [8, 8, 1])
    assert [output.name for output in session.get_outputs()] == ["score", "map"]
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    scores, maps = session.run(None, {"images": to_uint8(digit_images)})
    assert maps.shape == (len(digit_images), 1, 8, 8)
    verdicts = scores > metadata["threshold"]
    assert verdicts.tolist() == detector.predict(on_grid(digit_images)).pred_label.tolist()


def test_what_cannot_be_exported_is_refused(detector: DiffusionDetector, tmp_path: Path) -> None:
    def refused(given: DiffusionDetector, name: str, **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            export(given, tmp_path / name, **more)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert refused(detector, "a.bin").endswith("must end in .onnx or .pt2")
    assert refused(detector, "a.pt2", format="onnx").endswith("must end in .onnx")
    uncalibrated = detector.with_scoring(component_options("scorers", "reconstruction"))
    assert "has no threshold; finish its run" in refused(uncalibrated, "a.pt2")


def test_a_graph_that_scores_otherwise_is_not_written(
    tiny_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = trained_like(tiny_config.override(DIT))
    monkeypatch.setattr("raydiff.exporting.TOLERANCE", -1.0)
    with pytest.raises(
        RaydiffError, match=r"the exported scores or maps are .* away from the artefact's, more than -1;"
    ):
        export(detector, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_draws_other_maps_is_not_written(
    tiny_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = trained_like(tiny_config.override(DIT))

    class Other:
        @staticmethod
        def score(images: Tensor) -> Scores:
            found = detector.score(images)
            assert found.map is not None
            return Scores(found.image, found.map + 1e-3 * found.map.amax())

    monkeypatch.setattr("raydiff.exporting.load_exported", lambda _: Other)
    with pytest.raises(RaydiffError, match=r"scores or maps are 0\.00\d+ away"):
        export(detector, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_loaded_is_named(onnx_file: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises((ArtifactError, ConfigError)) as caught:
            load_exported(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no exported file; give one that ends in .onnx or .pt2" in refused(tmp_path / "a.bin")
    assert "there is no such file; write it with: raydiff export" in refused(tmp_path / "a.onnx")
    half = onnx_file.read_bytes()
    (tmp_path / "half.onnx").write_bytes(half[: len(half) // 2])
    assert "is no whole ONNX file" in refused(tmp_path / "half.onnx")
    (tmp_path / "half.pt2").write_bytes(b"PK")
    assert "is no whole .pt2 file" in refused(tmp_path / "half.pt2")
    import onnx

    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    assert "was not written by raydiff export" in refused(tmp_path / "foreign.onnx")
    onnx.helper.set_model_props(model, {METADATA: json.dumps({"export_version": 99})})
    onnx.save(model, tmp_path / "newer.onnx")
    assert "has export version 99; this raydiff reads 1" in refused(tmp_path / "newer.onnx")


def test_an_exported_detector_is_neither_calibrated_nor_saved(onnx_file: Path, tmp_path: Path) -> None:
    exported = load_exported(onnx_file)
    with pytest.raises(ConfigError, match="cannot be calibrated; do it with its artefact"):
        exported.calibrate(torch.zeros(4, 1, 8, 8))
    with pytest.raises(ConfigError, match="cannot be saved as an artefact"):
        exported.save(tmp_path / "artifact")
