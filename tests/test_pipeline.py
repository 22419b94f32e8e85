"""A photo's way to its template with a real model: turned photos, bystanders, and portraits on cards."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from bootstrap import load_engine
from engines.face_attributes import FaceAttributes, FaceAttributesModel
from engines.model_slots import ModelSlots
from errors import FaceError
from photos.decode import decode
from photos.pixels import Pixels
from pipeline import Pipeline, Trace
from settings import PROJECT, Settings, load_settings
from tests.support.fakes import NO_GATES, PORTRAIT_FACE, ScriptedAttributes, ScriptedEngine, a_portrait


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("models")
    engine = load_engine("compact", models_dir=folder, hub_timeout_s=0, threads=1, may_fall_back=False)
    return Pipeline(Settings(), engine, FaceAttributesModel(PROJECT / "models"), ModelSlots(1, 1), decode)


@pytest.fixture(scope="module")
def astronaut() -> Pixels:
    return a_portrait()


def png(image: Pixels) -> bytes:
    return bytes(cv2.imencode(".png", image)[1])


def turned(image: Pixels, quarters: int) -> Pixels:
    return np.ascontiguousarray(np.rot90(image, quarters))


def with_another(image: Pixels, width: int) -> Pixels:
    """A photo of the face in `image` with the same face once more, smaller, at its left."""
    face = image[20:190, 150:300]
    small = cv2.resize(face, (width, width * face.shape[0] // face.shape[1]), interpolation=cv2.INTER_AREA)
    both = image.copy()
    both[10 : 10 + small.shape[0], 10 : 10 + width] = small
    return both


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_photo_that_lies_on_its_side_or_head_gives_the_template_of_the_upright_one(
    pipeline: Pipeline, astronaut: Pixels, quarters: int
) -> None:
    upright = pipeline.template(png(astronaut))
    assert float(upright @ pipeline.template(png(turned(astronaut, quarters)))) > 0.9999


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_an_analysis_shows_the_face_where_the_file_has_it(pipeline: Pipeline, astronaut: Pixels, quarters: int) -> None:
    tall = np.ascontiguousarray(astronaut[:, 60:400])
    size = tall.shape[1], tall.shape[0]
    (expected,) = pipeline.analysis(png(tall)).faces
    found = pipeline.analysis(png(turned(tall, quarters)))
    assert (found.code, found.size) == (None, size[::-1] if quarters % 2 else size)
    assert found.faces[0].landmarks == pytest.approx(expected.turned(quarters, size).landmarks, abs=10)


def test_a_small_face_is_found_in_a_photo_that_lies_on_its_side(pipeline: Pipeline, astronaut: Pixels) -> None:
    wide = np.full((900, 900, 3), 128, np.uint8)
    wide[300:500, 225:425] = astronaut[:200, 120:320]
    upright = pipeline.template(png(wide))
    assert float(upright @ pipeline.template(png(turned(wide, 1)))) > 0.99


def test_a_head_that_leans_far_is_refused_as_tilted_and_not_turned(pipeline: Pipeline, astronaut: Pixels) -> None:
    wide = cv2.copyMakeBorder(astronaut, 100, 100, 100, 100, cv2.BORDER_REPLICATE)
    leaning = cv2.warpAffine(wide, cv2.getRotationMatrix2D((325, 210), 60, 1), wide.shape[1::-1])
    with pytest.raises(FaceError) as refused:
        pipeline.template(png(np.asarray(leaning, np.uint8)))
    assert refused.value.code == "head_tilted"


def test_a_second_person_is_refused_and_a_bystander_far_behind_is_not(pipeline: Pipeline, astronaut: Pixels) -> None:
    alone = pipeline.template(png(astronaut))
    assert float(alone @ pipeline.template(png(with_another(astronaut, 35)))) > 0.95
    with pytest.raises(FaceError) as refused:
        pipeline.template(png(with_another(astronaut, 110)))
    assert refused.value.code == "multiple_faces"


def test_on_a_card_the_widest_portrait_counts_and_may_be_grey(pipeline: Pipeline, astronaut: Pixels) -> None:
    card = cv2.cvtColor(cv2.cvtColor(with_another(astronaut, 90), cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    data = png(np.asarray(card, np.uint8))
    assert float(pipeline.template(png(astronaut)) @ pipeline.template(data, picture=True)) > 0.9
    with pytest.raises(FaceError):
        pipeline.template(data)


@pytest.mark.parametrize("factor", [1.35, 1 / 1.35])
def test_a_stretched_photo_is_told_from_the_same_person_s_unstretched(
    pipeline: Pipeline, astronaut: Pixels, factor: float
) -> None:
    straight = pipeline.template(png(astronaut))
    photo = png(np.asarray(cv2.resize(astronaut, None, fx=factor, fy=1), np.uint8))
    trace = Trace()
    stretched = pipeline.template(photo, trace, new_person=True)
    assert float(straight @ trace.restored[0]) > float(straight @ stretched) + 0.02
    pipeline.template(photo, trace, enrols=False)
    assert not trace.restored


def test_a_noisy_photo_is_told_from_the_same_person_s_smoothed(pipeline: Pipeline, astronaut: Pixels) -> None:
    straight = pipeline.template(png(astronaut))
    noise = np.random.default_rng(5).normal(0, 40, astronaut.shape)
    photo = png(np.clip(astronaut + noise, 0, 255).astype(np.uint8))
    trace, careless = Trace(), replace(pipeline.settings, min_likeness=-1.0, max_damage=1.0)
    noisy = replace(pipeline, settings=careless).template(photo, trace, new_person=True)
    assert float(straight @ trace.restored[-1]) > float(straight @ noisy) + 0.02


def test_a_face_that_cannot_be_restored_is_refused(pipeline: Pipeline, astronaut: Pixels) -> None:
    engine, reader = ScriptedEngine(), ScriptedAttributes()
    landmarks = PORTRAIT_FACE.landmarks[[0, 0, 2, 3, 4]]
    engine.faces, reader.seen = [replace(PORTRAIT_FACE, landmarks=landmarks)], FaceAttributes(likeness=0.7)
    settings = load_settings({}, environ=NO_GATES, env_file=None)
    careless = replace(pipeline, engine=engine, reader=reader, settings=settings)
    careless.template(png(astronaut))
    with pytest.raises(FaceError) as refused:
        careless.template(png(astronaut), new_person=True)
    assert refused.value.code == "landmarks_hidden"


def test_a_photo_that_nobody_changed_is_embedded_once(pipeline: Pipeline, astronaut: Pixels) -> None:
    trace = Trace()
    pipeline.template(png(astronaut), trace, new_person=True)
    assert not trace.restored


@pytest.mark.parametrize(("width", "code"), [(340, None), (270, "face_too_small")])
def test_the_portrait_on_a_card_may_be_smaller_than_a_selfie_by_a_quarter(
    pipeline: Pipeline, astronaut: Pixels, width: int, code: str | None
) -> None:
    card = np.full((630, 1000, 3), 230, np.uint8)
    card[150:450, 60:360] = cv2.resize(astronaut[:320, 80:400], (300, 300), interpolation=cv2.INTER_AREA)
    data = png(np.asarray(cv2.resize(card, (width, width * 63 // 100), interpolation=cv2.INTER_AREA), np.uint8))
    with pytest.raises(FaceError) as refused:
        pipeline.template(data)
    assert refused.value.code == "face_too_small"
    if code is None:
        assert float(pipeline.template(png(astronaut)) @ pipeline.template(data, picture=True)) > 0.6
    else:
        with pytest.raises(FaceError) as refused:
            pipeline.template(data, picture=True)
        assert refused.value.code == code


@pytest.mark.parametrize(("sigma", "is_sharp_enough"), [(4.2, True), (5.2, False)])
def test_the_portrait_on_a_card_may_be_less_sharp_than_a_selfie_by_a_quarter(
    pipeline: Pipeline, astronaut: Pixels, sigma: float, is_sharp_enough: bool
) -> None:
    data = png(np.asarray(cv2.GaussianBlur(astronaut[:320, 80:400], (0, 0), sigma), np.uint8))
    with pytest.raises(FaceError) as refused:
        pipeline.template(data)
    assert refused.value.code == "blurred"
    if is_sharp_enough:
        assert float(pipeline.template(png(astronaut)) @ pipeline.template(data, picture=True, enrols=False)) > 0.3
    else:
        with pytest.raises(FaceError) as refused:
            pipeline.template(data, picture=True, enrols=False)
        assert refused.value.code == "blurred"
