"""What Prometheus reads, and the dashboard that is drawn of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines.face_attributes import FaceAttributes
from gallery.decisions import Gallery
from settings import PROJECT, Settings
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_photo, jpeg


class Watched:
    def __init__(self, folder: Path) -> None:
        store = SqliteStore(folder / "faces.sqlite3")
        store.prepare()
        self.engine, self.covering = ScriptedEngine(), ScriptedAttributes()
        gallery = Gallery(store, self.engine.name, self.engine.dimension)
        self.client = make_app(Settings(data_dir=folder), self.engine, self.covering, store, gallery).test_client()

    def post(self, route: str) -> Any:
        return self.client.post(route, data={"file": (io.BytesIO(jpeg(a_photo())), "p.jpg")})

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = self.client.get("/metrics").get_data(as_text=True)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples().get((name, tuple(sorted(labels.items()))), 0.0)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_requests_are_counted_by_route_status_and_code(watched: Watched) -> None:
    for _ in range(2):
        watched.post("/signUp")
    common = {"method": "POST", "route": "/signUp"}
    assert watched.value("face_requests_total", **common, status="200", code="ok") == 1
    assert watched.value("face_requests_total", **common, status="409", code="duplicate_face") == 1
    assert watched.value("face_request_seconds_count", route="/signUp") == 2
    assert watched.value("face_stage_seconds_count", stage="embed") == 2
    assert watched.value("face_gallery_enrolled") == watched.value("face_log_place") == 1


def test_a_path_that_a_client_made_up_is_no_label(watched: Watched) -> None:
    watched.client.get("/no/such/path")
    watched.client.open("/", method="BREW")
    assert not any("such" in str(labels) and "path" in str(labels) for _, labels in watched.samples())
    assert not any("BREW" in str(labels) for _, labels in watched.samples())


@pytest.mark.parametrize("route", ["/verify", "/analyze"])
def test_every_check_that_a_photo_failed_is_counted(watched: Watched, route: str) -> None:
    watched.covering.seen = FaceAttributes(mask=0.9, sunglasses=0.9, other=0.0, hidden=0.0)
    watched.post(route)
    assert [watched.value("face_checks_failed_total", check=check) for check in ("mask", "sunglasses")] == [1, 1]


def test_similarities_are_kept_apart_by_what_became_of_them(watched: Watched) -> None:
    watched.post("/signUp")
    watched.post("/verify")
    watched.engine.template = -watched.engine.template
    watched.post("/verify")
    counts = [watched.value("face_similarity_count", route="/verify", accepted=one) for one in ("yes", "no")]
    assert counts == [1, 1]


def test_the_queue_is_empty_when_nobody_asks(watched: Watched) -> None:
    watched.post("/signUp")
    assert watched.value("face_queue_waiting") == watched.value("face_slots_used") == 0


def test_every_metric_on_the_dashboard_exists(watched: Watched) -> None:
    watched.covering.seen = FaceAttributes(mask=0.9, sunglasses=0.0, other=0.0, hidden=0.0)
    watched.post("/signUp")
    watched.covering.seen = FaceAttributes(mask=0.0, sunglasses=0.0, other=0.0, hidden=0.0)
    watched.post("/signUp")
    watched.post("/verify")
    names = {name for name, _ in watched.samples()}
    dashboard = json.loads((PROJECT / "deploy" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"\b(?:face|process)_\w+", query)}
    assert used
    assert used <= names
