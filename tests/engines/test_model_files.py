"""Model files: only verified model files are ever found under their names, whatever the hub does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.model_files import AURAFACE, PARTIAL, ModelFile, ModelUnavailable, ensure
from settings import PROJECT
from tests.support.hub_stand_in import COMMIT, REPO, HubStandIn, Manner, serving

# Bigger than the pieces in which the library writes (10 MB), so that resuming is seen to work.
DETECTOR = random.Random(1).randbytes(11_000_000)
RECOGNISER = random.Random(2).randbytes(100_000)
CONTENT = {"det.onnx": DETECTOR, "rec.onnx": RECOGNISER}
FILES = tuple(
    ModelFile(name, len(content), hashlib.sha256(content).hexdigest(), task, REPO)
    for (name, content), task in zip(CONTENT.items(), ("detection", "recognition"), strict=True)
)
RECOGNISER_ALONE = FILES[1:]

# A process of its own, since the library reads its environment when it is imported. The library's pauses between
# its retries are left out: it is what it does after them that is tested.
START = """
import json, sys, time
from pathlib import Path
from engines.model_files import ModelFile, ModelUnavailable, ensure
time.sleep = lambda seconds: None
given = json.loads(sys.argv[1])
try:
    ensure(
        Path(given["folder"]),
        [ModelFile(**file) for file in given["files"]],
        hub_timeout_s=given["hub_timeout_s"],
    )
except ModelUnavailable as error:
    print(error)
"""


class Operator:
    """Starts the service's fetching in processes, in an environment of the test's own."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "models" / "some-model"
        self.hf_home = tmp_path / "hf_home"
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
        self.environment = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
        self.environment |= {
            "HOME": str(tmp_path / "home"),
            "HF_HOME": str(self.hf_home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "PYTHONPATH": str(PROJECT),
        }

    def begin(self, files: tuple[ModelFile, ...] = FILES, hub_timeout_s: float = 30) -> subprocess.Popen[str]:
        given: dict[str, Any] = {
            "folder": str(self.folder),
            "files": [dataclasses.asdict(file) for file in files],
            "hub_timeout_s": hub_timeout_s,
        }
        return subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(given)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, files: tuple[ModelFile, ...] = FILES, hub_timeout_s: float = 30) -> str:
        """Run to the end; return what was told to the operator, '' when every file is in place."""
        return self.finish(self.begin(files, hub_timeout_s))

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> str:
        try:
            told, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        return told

    def place(self, name: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def placed(self) -> dict[str, bytes]:
        """Everything that lies in the folder but the lock, which stays."""
        found = {path.name: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        return {name: content for name, content in found.items() if name != ".lock"}


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path)


@pytest.fixture
def hub(operator: Operator) -> Iterator[HubStandIn]:
    with serving({**CONTENT, "genderage.onnx": b"not needed"}) as hub:
        operator.environment["HF_ENDPOINT"] = hub.url
        yield hub


def test_only_the_needed_files_are_fetched_and_no_second_copy_is_left(
    operator: Operator, hub: HubStandIn, tmp_path: Path
) -> None:
    assert operator.start() == ""
    assert operator.placed() == CONTENT
    assert {path.rpartition("/")[2] for path in hub.requests} == set(CONTENT)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert on_disk < 1.1 * sum(map(len, CONTENT.values()))


def test_a_second_start_asks_the_hub_nothing(operator: Operator, hub: HubStandIn) -> None:
    operator.start()
    hub.requests.clear()
    assert operator.start() == ""
    assert hub.requests == []


def test_files_placed_by_hand_need_neither_hub_nor_write_access(operator: Operator) -> None:
    for name, content in CONTENT.items():
        operator.place(name, content)
    operator.folder.chmod(0o500)
    ensure(operator.folder, FILES, hub_timeout_s=0)
    assert operator.placed() == CONTENT


@pytest.mark.parametrize("damaged", [RECOGNISER[:-1], RECOGNISER[:-1] + b"?", b""])
def test_a_damaged_file_is_fetched_anew_and_the_right_one_left_alone(
    operator: Operator, hub: HubStandIn, damaged: bytes
) -> None:
    operator.place("det.onnx", DETECTOR)
    operator.place("rec.onnx", damaged)
    assert operator.start() == ""
    assert operator.placed() == CONTENT
    assert hub.downloads() == ["rec.onnx"]


@pytest.mark.parametrize("mishap", ["wrong", "reset"])
def test_a_file_that_arrives_wrong_is_fetched_once_more(operator: Operator, hub: HubStandIn, mishap: Manner) -> None:
    hub.at_first = [mishap]
    assert operator.start(RECOGNISER_ALONE) == ""
    assert operator.placed() == {"rec.onnx": RECOGNISER}
    assert hub.downloads() == ["rec.onnx", "rec.onnx"]


def test_a_file_that_arrives_wrong_twice_is_refused_by_name_with_both_digests(
    operator: Operator, hub: HubStandIn
) -> None:
    hub.manner = "wrong"
    told = operator.start(RECOGNISER_ALONE)
    arrived = hashlib.sha256(RECOGNISER[:-1] + bytes([RECOGNISER[-1] ^ 1])).hexdigest()
    assert "rec.onnx" in told
    assert arrived in told
    assert RECOGNISER_ALONE[0].sha256 in told
    assert operator.placed() == {}
    assert hub.downloads() == ["rec.onnx", "rec.onnx"]


def test_a_download_that_breaks_off_goes_on_where_it_stopped(operator: Operator, hub: HubStandIn) -> None:
    hub.at_first = ["broken_off", "broken_off", "stalled"]
    assert operator.start(FILES[:1]) == ""
    assert operator.placed() == {"det.onnx": DETECTOR}


@pytest.mark.parametrize("mishap", ["broken_off", "reset", pytest.param("stalled", marks=pytest.mark.slow)])
def test_a_download_that_never_ends_leaves_nothing_and_the_next_start_completes_it(
    operator: Operator, hub: HubStandIn, mishap: Manner
) -> None:
    hub.manner = mishap
    told = operator.start(RECOGNISER_ALONE)
    assert "Fetching rec.onnx" in told
    assert operator.placed() == {}
    hub.manner = "well"
    assert operator.start(RECOGNISER_ALONE) == ""
    assert operator.placed() == {"rec.onnx": RECOGNISER}


def test_a_process_killed_in_mid_download_leaves_nothing_that_loads_and_nothing_for_ever(
    operator: Operator, hub: HubStandIn
) -> None:
    operator.environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "60"
    hub.manner = "stalled"
    process = operator.begin(RECOGNISER_ALONE)
    assert hub.begun.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (operator.folder / PARTIAL).is_dir()
    assert not (operator.folder / "rec.onnx").exists()
    hub.manner = "well"
    assert operator.start(RECOGNISER_ALONE) == ""
    assert not (operator.folder / PARTIAL).exists()
    assert operator.placed() == {"rec.onnx": RECOGNISER}


@pytest.mark.slow
def test_a_slow_download_goes_on_past_the_time_for_an_unreachable_hub(operator: Operator, hub: HubStandIn) -> None:
    hub.manner = "slowly"
    assert operator.start(RECOGNISER_ALONE, hub_timeout_s=2) == ""
    assert operator.placed() == {"rec.onnx": RECOGNISER}


@pytest.mark.slow
def test_two_servers_starting_at_once_fetch_each_file_once(operator: Operator, hub: HubStandIn) -> None:
    hub.manner = "slowly"
    first = operator.begin(RECOGNISER_ALONE)
    assert hub.begun.wait(60)
    second = operator.begin(RECOGNISER_ALONE)
    assert (operator.finish(first), operator.finish(second)) == ("", "")
    assert operator.placed() == {"rec.onnx": RECOGNISER}
    assert hub.downloads() == ["rec.onnx"]


def a_port(*, listening: bool) -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listening:
            taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    "kind", ["refusing", "silent", "trickling", "behind a dead proxy", "no address", "half an address", "portal"]
)
def test_an_unreachable_hub_is_reported_with_what_to_do(operator: Operator, hub: HubStandIn, kind: str) -> None:
    closed, silent = a_port(listening=False), a_port(listening=True)
    match kind:
        case "refusing":
            operator.environment["HF_ENDPOINT"] = f"http://127.0.0.1:{next(closed)}"
        case "silent":
            operator.environment["HF_ENDPOINT"] = f"http://127.0.0.1:{next(silent)}"
        case "behind a dead proxy":
            operator.environment["HTTP_PROXY"] = f"http://127.0.0.1:{next(closed)}"
        case "no address":
            operator.environment["HF_ENDPOINT"] = "hub.example"
        case "half an address":
            operator.environment["HF_ENDPOINT"] = "http://[nowhere"
        case "trickling":
            hub.manner = "trickling"
        case "portal":
            hub.manner = "portal"
    # Generous for those that do answer; these two take it all.
    told = operator.start(hub_timeout_s=1 if kind in ("silent", "trickling") else 30)
    assert ("HF_ENDPOINT" if kind == "half an address" else operator.environment["HF_ENDPOINT"]) in told
    assert str(operator.folder) in told
    for file in FILES:
        assert f"{file.name}  {file.size} bytes  SHA-256 {file.sha256}" in told
    assert operator.placed() == {}


def test_a_hub_that_lacks_the_file_is_named_as_such(operator: Operator, hub: HubStandIn) -> None:
    del hub.files["rec.onnx"]
    assert "404" in operator.start(RECOGNISER_ALONE)


def test_a_private_repository_is_read_with_a_token_and_explained_without(operator: Operator, hub: HubStandIn) -> None:
    hub.token = "hf_secret"
    told = operator.start(RECOGNISER_ALONE)
    assert "HF_TOKEN" in told
    operator.environment["HF_TOKEN"] = hub.token
    assert operator.start(RECOGNISER_ALONE) == ""


def test_offline_nothing_is_asked_and_the_operator_is_told_what_to_place(operator: Operator, hub: HubStandIn) -> None:
    operator.environment["HF_HUB_OFFLINE"] = "1"
    operator.place("det.onnx", DETECTOR)
    told = operator.start()
    assert "HF_HUB_OFFLINE" in told
    assert RECOGNISER_ALONE[0].sha256 in told
    assert "det.onnx" not in told
    assert hub.requests == []


@pytest.mark.parametrize(("cached", "served"), [(RECOGNISER, True), (RECOGNISER[:-1], False)])
def test_what_lies_in_the_operators_hub_cache_is_used_offline_if_it_is_right(
    operator: Operator, cached: bytes, served: bool
) -> None:
    operator.environment["HF_HUB_OFFLINE"] = "1"
    repository = operator.hf_home / "hub" / f"models--{REPO.replace('/', '--')}"
    for path, content in {"refs/main": COMMIT.encode(), f"snapshots/{COMMIT}/rec.onnx": cached}.items():
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_bytes(content)
    assert (operator.start(RECOGNISER_ALONE) == "") is served
    assert operator.placed() == ({"rec.onnx": RECOGNISER} if served else {})


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(ModelUnavailable, match="models"):
        ensure(tmp_path / "models" / "auraface", FILES, hub_timeout_s=0)


def test_auraface_is_a_detector_and_a_recogniser_and_nothing_else() -> None:
    assert {file.name: file.task for file in AURAFACE} == {
        "scrfd_10g_bnkps.onnx": "detection",
        "glintr100.onnx": "recognition",
    }
