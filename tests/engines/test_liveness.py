"""Liveness by InsightFace's add-on: its real loader, on small models that are made here, and what fails closed."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from insightface.addons import catalog
from onnx import TensorProto, helper, numpy_helper

import bootstrap
from engines.liveness import AddOnLiveness
from engines.model_files import ModelUnavailable
from face_checks import liveness_check
from gallery.decisions import Gallery
from settings import Settings
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_face, a_photo, jpeg


def write_model(folder: Path, monkeypatch: pytest.MonkeyPatch, probability: float, side: int = 80) -> Path:
    """A model that gives one probability for every face, under the digest that the catalogue then names."""
    path = folder / "addons" / "liveness.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["face"], ["mean"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Mul", ["mean", "nothing"], ["zero"]),
            helper.make_node("Add", ["zero", "probability"], ["live"]),
        ],
        "liveness",
        [value("face", TensorProto.FLOAT, [1, 3, side, side])],
        [value("live", TensorProto.FLOAT, [1])],
        [
            numpy_helper.from_array(np.zeros(1, np.float32), "nothing"),
            numpy_helper.from_array(np.array([probability], np.float32), "probability"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    known = catalog.ADDON_CATALOG["liveness"]
    artifact = replace(known, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), url="http://127.0.0.1:9/none")
    monkeypatch.setattr(catalog, "ADDON_CATALOG", {"liveness": artifact})
    return path


@pytest.mark.parametrize(("probability", "passed"), [(0.81, True), (0.79, False)])
def test_a_face_is_live_from_the_least_probability_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probability: float, passed: bool
) -> None:
    write_model(tmp_path, monkeypatch, probability)
    check = liveness_check(AddOnLiveness(tmp_path).score(a_photo(), a_face()), Settings(min_liveness=0.8))
    assert (check.code, check.passed) == ("not_live", passed)
    assert check.measured == pytest.approx(probability)


@pytest.mark.parametrize("probability", [float("nan"), 1.5, -0.1])
def test_what_the_model_cannot_say_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probability: float
) -> None:
    write_model(tmp_path, monkeypatch, probability)
    check = liveness_check(AddOnLiveness(tmp_path).score(a_photo(), a_face()), Settings(min_liveness=0.0))
    assert (check.code, check.passed, check.measured) == ("liveness_not_assessed", False, None)


def test_a_face_with_too_little_picture_around_it_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, monkeypatch, 0.99)
    face = a_face(inter_eye_distance=250.0)
    assert AddOnLiveness(tmp_path).score(a_photo(), face) is None


def test_landmarks_that_align_to_nothing_have_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, monkeypatch, 0.99)
    face = replace(a_face(), landmarks=np.zeros((5, 2), np.float32))
    assert not liveness_check(AddOnLiveness(tmp_path).score(a_photo(), face), Settings()).passed


def test_another_file_than_the_library_names_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path, monkeypatch, 0.99)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelUnavailable, match="SHA256"):
        AddOnLiveness(tmp_path)


def test_a_model_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, monkeypatch, 0.99, side=64)
    with pytest.raises(ModelUnavailable, match="80"):
        AddOnLiveness(tmp_path)


def test_a_model_that_cannot_be_fetched_says_where_it_is_and_under_which_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, monkeypatch, 0.99).unlink()
    with pytest.raises(ModelUnavailable, match=r"SHA-256 (.|\n)*non-commercial"):
        AddOnLiveness(tmp_path)


def a_service(folder: Path, mode: str) -> tuple[Any, ScriptedEngine]:
    """A client of a service with the model in `folder`."""
    store = SqliteStore(folder / "faces.sqlite3")
    store.prepare()
    engine = ScriptedEngine()
    gallery = Gallery(store, engine.name, engine.dimension)
    settings = Settings(data_dir=folder, models_dir=folder, liveness=mode)
    liveness = bootstrap.liveness_of(settings)
    app = make_app(settings, engine, ScriptedAttributes(), store, gallery, liveness=liveness)
    return app.test_client(), engine


def answers(folder: Path, mode: str) -> tuple[Any, Any, ScriptedEngine]:
    """What a service says to a sign-up and an analysis."""
    client, engine = a_service(folder, mode)
    found = [
        client.post(route, data={"file": (io.BytesIO(jpeg(a_photo())), "p.jpg")}) for route in ("/signUp", "/analyze")
    ]
    return found[0], found[1], engine


def test_enforced_a_picture_of_a_face_is_refused_before_it_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, monkeypatch, 0.1)
    signed_up, analysed, engine = answers(tmp_path, "enforce")
    assert (signed_up.status_code, signed_up.json["code"], engine.embeddings) == (422, "not_live", 0)
    assert signed_up.json["checks"][-1]["hint"]
    assert (analysed.json["accepted"], analysed.json["code"]) == (False, "not_live")


def test_enforced_a_live_face_passes_and_the_check_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, monkeypatch, 0.95)
    signed_up, analysed, _ = answers(tmp_path, "enforce")
    assert signed_up.status_code == 200
    assert analysed.json["checks"][-1]["code"] == "not_live"


def test_observed_a_picture_of_a_face_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, monkeypatch, 0.1)
    with caplog.at_level("INFO"):
        signed_up, analysed, _ = answers(tmp_path, "observe")
    assert signed_up.status_code == 200
    assert "not_live" not in [check["code"] for check in analysed.json["checks"]]
    assert "0.1" in str([getattr(record, "fields", {}).get("liveness") for record in caplog.records])


def test_enforced_the_second_photo_of_a_comparison_may_be_of_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, monkeypatch, 0.1)
    client, engine = a_service(tmp_path, "enforce")
    photos = {name: (io.BytesIO(jpeg(a_photo())), "p.jpg") for name in ("file1", "file2")}
    refused = client.post("/compare", data=photos).json
    assert (refused["code"], refused["field"], engine.embeddings) == ("not_live", "file1", 0)
    write_model(tmp_path, monkeypatch, 0.9)
    client, _ = a_service(tmp_path, "enforce")
    asked: list[Any] = []
    score = AddOnLiveness.score

    def counted(self: AddOnLiveness, image: Any, face: Any) -> Any:
        asked.append(face)
        return score(self, image, face)

    monkeypatch.setattr(AddOnLiveness, "score", counted)
    photos = {name: (io.BytesIO(jpeg(a_photo())), "p.jpg") for name in ("file1", "file2")}
    assert (client.post("/compare", data=photos).status_code, len(asked)) == (200, 1)
