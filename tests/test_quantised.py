"""Owns what EMBEDDING_PRECISION=int8 and ORT_PROVIDERS promise: a checked copy made once, no silent falling back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from fakes import write_tiny_pack

import insightface_engine
import quantised
import weights
from insightface_engine import InsightFaceEngine
from weights import ModelUnavailable
from wiring import load_engine

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

Pixels = npt.NDArray[np.uint8]


class Recogniser:
    """The tiny pack's recogniser, by its file."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        write_tiny_pack(folder / "pack", seed=seed)
        self.source = folder / "pack" / "rec.onnx"
        self.digest = weights.digest(self.source)
        self.folder = folder / "int8"
        self.session = onnxruntime.InferenceSession(str(self.source), providers=["CPUExecutionProvider"])
        self.made = 0

    def embed(self, session: Any, crops: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        blobs = [(np.asarray(crop, np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5 for crop in crops]
        return np.concatenate([(session or self.session).run(None, {"data": blob})[0] for blob in blobs])

    def crops(self) -> list[Pixels]:
        self.made += 1
        rng = np.random.default_rng(1)
        return [np.kron(rng.integers(0, 256, (7, 7, 3), np.uint8), np.ones((16, 16, 1), np.uint8)) for _ in range(4)]

    def copy(self) -> Path:
        return quantised.int8_copy(self.source, self.digest, self.folder, self.crops, self.embed)


def test_the_copy_is_made_once_and_embeds_nearly_alike(tmp_path: Path) -> None:
    recogniser = Recogniser(tmp_path)
    copy = recogniser.copy()
    assert recogniser.copy() == copy
    assert recogniser.made == 1
    session = onnxruntime.InferenceSession(str(copy), providers=["CPUExecutionProvider"])
    faces = recogniser.crops()
    ours, theirs = recogniser.embed(session, faces), recogniser.embed(None, faces)
    cosines = np.vecdot(ours, theirs) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() > quantised.LEAST_MEAN_COSINE
    assert not np.array_equal(ours, theirs)
    assert [path.name for path in sorted(recogniser.folder.iterdir())] == [copy.with_suffix(".json").name, copy.name]


@pytest.mark.parametrize("harm", ["another bit", "cut off", "no description", "a description of another", "nonsense"])
def test_a_copy_that_is_not_as_it_was_made_is_made_again(tmp_path: Path, harm: str) -> None:
    recogniser = Recogniser(tmp_path)
    copy = recogniser.copy()
    whole, about = copy.read_bytes(), copy.with_suffix(".json")
    if harm == "another bit":
        copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "cut off":
        copy.write_bytes(whole[:100])
    elif harm == "no description":
        about.unlink()
    elif harm == "a description of another":
        about.write_text(json.dumps({**json.loads(about.read_text()), "source_sha256": "0" * 64}))
    else:
        about.write_text("[1]")
    assert recogniser.copy() == copy
    assert recogniser.made == 2
    assert json.loads(about.read_text())["sha256"] == weights.digest(copy)


def test_another_recogniser_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    one, other = Recogniser(tmp_path / "one"), Recogniser(tmp_path / "other", seed=1)
    other.folder = one.folder
    assert one.copy() != other.copy()
    assert one.copy().exists()


def test_a_copy_that_differs_too_much_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "LEAST_COSINE", 1.1)
    recogniser = Recogniser(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"differs too much .* EMBEDDING_PRECISION=fp32"):
        recogniser.copy()
    assert list(recogniser.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    recogniser = Recogniser(tmp_path)
    recogniser.folder.write_text("in the way")
    with pytest.raises(ModelUnavailable, match=r"cannot be kept in .*int8"):
        recogniser.copy()


def test_a_detector_that_finds_no_face_to_calibrate_with_is_told_so(tmp_path: Path) -> None:
    write_tiny_pack(tmp_path / "pack")
    with pytest.raises(ModelUnavailable, match="finds no faces in the photos"):
        InsightFaceEngine(tmp_path / "pack", threads=1, precision="int8")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared pack is not beside this clone")
def test_a_real_recognisers_copy_has_a_name_of_its_own_and_compares_with_its_like(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    for file in (SHARED / "pack").iterdir():
        (pack / file.name).symlink_to(file)
    whole, small = (InsightFaceEngine(pack, threads=1, precision=precision) for precision in ("fp32", "int8"))
    assert small.name == f"{whole.name}-int8"
    (photo, *_) = quantised.photos()
    (face,) = whole.detect(photo)
    ours, theirs = small.embed(photo, face), whole.embed(photo, face)
    assert float(np.linalg.norm(ours)) == pytest.approx(1)
    assert 0.97 < float(np.vecdot(ours, theirs)) < 1


def test_cuda_is_taken_where_it_is_and_demanded_only_where_asked_for() -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert insightface_engine._providers("auto", [cpu], "fp32") == [cpu]
    assert insightface_engine._providers("auto", [cuda, cpu], "fp32") == [cuda, cpu]
    assert insightface_engine._providers("auto", [cuda, cpu], "int8") == [cpu]
    assert insightface_engine._providers("cpu", [cuda, cpu], "fp32") == [cpu]
    assert insightface_engine._providers("cuda", [cuda, cpu], "fp32") == [cuda, cpu]
    with pytest.raises(ModelUnavailable, match="install onnxruntime-gpu"):
        insightface_engine._providers("cuda", [cpu], "fp32")
    with pytest.raises(ModelUnavailable, match="int8 is for CPUs"):
        insightface_engine._providers("cuda", [cuda, cpu], "int8")


def test_a_gpu_that_is_demanded_and_absent_stops_the_start(tmp_path: Path) -> None:
    write_tiny_pack(tmp_path / "pack")
    with pytest.raises(ModelUnavailable, match="ORT_PROVIDERS=cuda"):
        InsightFaceEngine(tmp_path / "pack", threads=1, providers="cuda")


@pytest.mark.parametrize("wanted", [{"precision": "int8"}, {"providers": "cuda"}])
def test_the_compact_model_says_that_it_has_neither(tmp_path: Path, wanted: dict[str, str]) -> None:
    with pytest.raises(ModelUnavailable, match="compact model has neither"):
        load_engine("compact", models_dir=tmp_path, hub_timeout_s=1, threads=1, may_fall_back=True, **wanted)
