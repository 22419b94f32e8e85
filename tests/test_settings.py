"""Settings: where each value comes from, which values are refused, and that every one of them is documented."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from settings import PROJECT, Settings, SettingsError, add_flags, load_settings, settings_warnings

NAMES = [setting.name for setting in fields(Settings)]


def load(environ: dict[str, str] | None = None, flags: dict[str, str] | None = None, file: Path | None = None) -> Any:
    return load_settings(flags, environ or {}, file)


def refusal(**environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(environ)
    return str(caught.value)


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    assert load().port == 5000
    file.write_text("# a comment\nPORT=1\n")
    assert load(file=file).port == 1
    assert load({"PORT": "2"}, file=file).port == 2
    assert load({"PORT": "2"}, {"port": "3"}, file).port == 3


def test_an_empty_value_asks_for_the_default_whatever_stands_below_it(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=1\nHOST=\nMONGO_URI\n")
    settings = load({"PORT": "", "HOST": " "}, file=file)
    assert (settings.port, settings.host, settings.mongo_uri) == (5000, "127.0.0.1", "")


def test_a_missing_file_is_fine(tmp_path: Path) -> None:
    assert load(file=tmp_path / "nowhere") == load()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's own file that nobody can read")
def test_a_file_that_cannot_be_read_is_not_a_missing_one() -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load(file=Path("/proc/self/mem"))


def test_a_value_of_the_file_never_reaches_the_environment_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MONGO_URI", raising=False)
    file = tmp_path / ".env"
    file.write_text("MONGO_URI=mongodb://secret\n")
    assert load_settings(env_file=file).mongo_uri == "mongodb://secret"
    assert "MONGO_URI" not in os.environ


def test_a_secret_may_lie_in_a_file_that_the_environment_names(tmp_path: Path) -> None:
    (tmp_path / "uri").write_text("mongodb://me:hunter2@db\n")
    named = {"MONGO_URI_FILE": str(tmp_path / "uri")}
    assert load(named).mongo_uri == "mongodb://me:hunter2@db"
    assert load({**named, "MONGO_URI": "mongodb://other"}).mongo_uri == "mongodb://other"
    # As in a copy of .env.example, which has the name with nothing behind it.
    assert load({**named, "MONGO_URI": ""}).mongo_uri == "mongodb://me:hunter2@db"
    assert refusal(MONGO_URI_FILE=str(tmp_path / "nowhere")).startswith("MONGO_URI_FILE")


@pytest.mark.parametrize(("text", "meant"), [("1", True), ("True", True), ("on", True), ("0", False), ("false", False)])
def test_a_switch_means_what_it_says(text: str, meant: bool) -> None:
    assert load({"DEBUG": text}).debug is meant


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DEBUG", "maybe"),
        ("PORT", "http"),
        ("PORT", "-1"),
        ("PORT", "65536"),
        ("PORT", "5000.5"),
        ("VERIFY_THRESHOLD", "nan"),
        ("DUPLICATE_THRESHOLD", "nan"),
        ("VERIFY_THRESHOLD", "inf"),
        ("VERIFY_THRESHOLD", "1.01"),
        ("VERIFY_THRESHOLD", "0,5"),
        ("THRESHOLD_FLOOR", "-1.01"),
        ("MAX_FILE_BYTES", "0"),
        ("MODEL_SLOTS", "0"),
        ("HUB_TIMEOUT_S", "16"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_name(name: str, text: str) -> None:
    assert refusal(**{name: text}).startswith(name)


@pytest.mark.parametrize("name", [one.name.upper() for one in fields(Settings) if str(one.type) in ("int", "float")])
def test_no_number_may_be_nan_or_a_word_or_endless(name: str) -> None:
    for text in ("nan", "inf", "-inf", "many"):
        assert refusal(**{name: text}).startswith(name)


def test_a_flag_of_the_wrong_kind_is_refused_too() -> None:
    with pytest.raises(SettingsError, match="PORT"):
        load(flags={"port": "x"})


def test_whoever_would_verify_cannot_enrol_twice_unless_the_operator_says_otherwise() -> None:
    assert load().duplicate_threshold == load().verify_threshold == 0.5
    assert load({"VERIFY_THRESHOLD": "0.7"}).duplicate_threshold == 0.7
    assert load({"VERIFY_THRESHOLD": "0.7", "DUPLICATE_THRESHOLD": "0.6"}).duplicate_threshold == 0.6


def test_photos_that_add_themselves_are_refused_where_none_could_have_its_challenge() -> None:
    given = {"UPDATE_TEMPLATE": "on_verify", "CHALLENGE_SIGN_UP": "require", "CHALLENGE_VERIFY": "off"}
    assert "UPDATE_TEMPLATE=on_verify would store no photo" in refusal(**given)
    assert load(given | {"CHALLENGE_VERIFY": "accept"}).update_template == "on_verify"


def test_a_floor_above_the_threshold_it_stands_under_is_refused() -> None:
    assert "THRESHOLD_FLOOR" in refusal(THRESHOLD_FLOOR="0.6")
    assert load({"THRESHOLD_FLOOR": "0.6", "VERIFY_THRESHOLD": "0.6"}).threshold_floor == 0.6


def test_an_uploads_folder_whose_emptying_would_take_the_gallery_along_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "data"):
        said = refusal(UPLOADS_DIR=str(folder), DATA_DIR=str(tmp_path / "data"))
        assert "UPLOADS_DIR" in said


def test_a_verify_threshold_below_the_usual_floor_takes_the_floor_along() -> None:
    assert load({"VERIFY_THRESHOLD": "0.38"}).threshold_floor == 0.38
    assert load({"VERIFY_THRESHOLD": "0.6"}).threshold_floor == 0.4


def test_photos_never_take_every_thread() -> None:
    assert "REQUEST_THREADS" in refusal(MODEL_SLOTS="15", REQUEST_THREADS="16")
    assert load({"MODEL_SLOTS": "14", "REQUEST_THREADS": "16"}).photo_requests == 14
    assert load().photo_requests < load().request_threads


@pytest.mark.parametrize("kept", ["data", "data/audit", "data/gallery", "models", "secrets"])
def test_an_uploads_folder_that_is_a_link_to_what_is_kept_is_refused(tmp_path: Path, kept: str) -> None:
    (tmp_path / kept).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / kept)
    folders: dict[str, Any] = {"data_dir": tmp_path / "data", "models_dir": tmp_path / "models"}
    with pytest.raises(SettingsError, match="UPLOADS_DIR"):
        Settings(**folders, api_keys_file=str(tmp_path / "secrets" / "keys"), uploads_dir=tmp_path / "link")
    assert Settings(**folders, uploads_dir=tmp_path / "data" / "uploads").uploads_dir.name == "uploads"


@pytest.mark.parametrize(
    "line",
    ["TEMPLATE_KEY=abc", "LIVENES=enforce", "VERIFY_TRESHOLD=0.38", "verify_threshold=0.38", "PORT: 7013", "PROT=7013",
     "MONGO_URL=mongodb://db", "LOG_FORMAT='json", "VERIFY-THRESHOLD=0.4", "PORTS=1", "MONGO_URI_FIL=/x", "=5",
     "verifyThreshold=1"],
)  # fmt: skip
def test_a_line_that_is_probably_a_mistake_ends_the_start_with_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / ".env"
    file.write_text(f"# mine\nHOST=127.0.0.1\n{line}\n")
    with pytest.raises(SettingsError, match=r"\.env, line 3") as refusal:
        load(file=file)
    assert "0.38" not in str(refusal.value)
    assert "abc" not in str(refusal.value)


def test_a_mistaken_name_is_told_with_the_name_that_was_meant(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("VERIFY_TRESHOLD=0.38\n")
    with pytest.raises(SettingsError, match="VERIFY_THRESHOLD"):
        load(file=file)


def test_a_name_with_two_values_is_refused_and_a_line_added_to_the_example_is_not(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=\nPORT=7013\nPORT=7013\n")
    assert load(file=file).port == 7013
    file.write_text("PORT=7013\nPORT=7014\n")
    with pytest.raises(SettingsError, match=r"line 2: PORT .* line 1"):
        load(file=file)


def test_a_folder_in_the_place_of_the_file_is_no_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="folder"):
        load(file=tmp_path)


def test_names_of_others_are_one_warning(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("COMPOSE_PROJECT_NAME=faces\nHOME=/x\nHF_TOKEN=secret\nPOSTGRES_USER=me\nMONGO_URI_FILE=\n")
    file.chmod(0o600)
    assert load(file=file) == load()
    (line,) = settings_warnings({}, file)
    assert "COMPOSE_PROJECT_NAME, HOME, POSTGRES_USER" in line
    assert "HF_TOKEN" not in line


def test_secrets_that_other_users_can_read_are_a_warning(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=1\nMONGO_URI=mongodb://me:hunter2@db\n")
    for mode, warned in ((0o644, 1), (0o640, 1), (0o600, 0)):
        file.chmod(mode)
        said = settings_warnings({}, file)
        assert len(said) == warned
        assert "hunter2" not in "".join(said)
    file.write_text("PORT=1\n")
    file.chmod(0o644)
    assert settings_warnings({}, file) == []


def test_a_name_of_the_environment_that_is_nearly_ours_is_a_warning(tmp_path: Path) -> None:
    usual = {"HOME": "/", "PATH": "/", "HOSTNAME": "x", "HF_HOME": "x", "LANG": "C", "SHELL": "sh", "USER": "me"}
    file = tmp_path / "nowhere"
    assert settings_warnings(usual, file) == []
    (line,) = settings_warnings({**usual, "LIVENES": "enforce"}, file)
    assert "LIVENES" in line
    assert "LIVENESS" in line
    assert settings_warnings({"PORTS": "1", "PORT": "2"}, file) == []


@pytest.mark.parametrize("name", ["MONGO_URI", "LIMITS_STORAGE"])
@pytest.mark.parametrize("password", ["p@ss", "pa/ss", "p:ss", "p?ss", "p#ss", "p%ss", "p@ss/word"])
def test_a_password_that_would_become_a_host_name_is_refused_and_not_shown(name: str, password: str) -> None:
    for scheme in ("mongodb", "mongodb+srv"):
        said = refusal(**{name: f"{scheme}://me:{password}@db.example/x?y=z"})
        assert said.startswith(name)
        assert "percent-encoded" in said
        assert password not in said
    assert load({name: "mongodb://me:p%40ss@db.example,db2.example:27018/x?y=z"})


@pytest.mark.parametrize("other", [{"PORT": "x"}, {"THRESHOLD_FLOOR": "0.9"}, {"LOG_FORMAT": "xml"}])
def test_no_message_repeats_the_connection_string(other: dict[str, str]) -> None:
    assert "hunter2" not in refusal(MONGO_URI="mongodb://me:hunter2@db", **other)


def test_settings_cannot_change_while_the_service_runs() -> None:
    with pytest.raises(AttributeError):
        load().port = 1


def test_a_relative_folder_is_fixed_at_start_and_a_tilde_is_home() -> None:
    assert load({"DATA_DIR": "here"}).data_dir == Path.cwd() / "here"
    assert load({"DATA_DIR": "~/faces"}).data_dir == Path.home() / "faces"


def parse(*arguments: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


SWITCHES = [one.name for one in fields(Settings) if str(one.type) == "bool"]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_flag(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    value = [] if name in SWITCHES else ["7"]
    assert parse(flag, *value) == {name: "true" if name in SWITCHES else "7"}


def test_a_flag_that_is_not_used_decides_nothing() -> None:
    assert parse() == {}


def test_every_flag_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for setting in fields(Settings):
        assert " ".join(setting.metadata["help"].split())[:30] in shown


def test_the_example_file_is_made_of_the_defaults() -> None:
    example = PROJECT / ".env.example"
    assert load(file=example) == load()
    set_there = {line.lstrip("#").split("=")[0] for line in example.read_text(encoding="utf-8").splitlines()}
    assert {name.upper() for name in NAMES} <= set_there
