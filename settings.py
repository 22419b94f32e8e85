"""Every setting of the service: read from flags, the environment, `.env` and defaults, and checked at start."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from env_file import HUB_PREFIX, EnvFile, EnvFileError, name_meant, read_env_file
from store import encryption

PROJECT = Path(__file__).resolve().parent
ENV_FILE = PROJECT / ".env"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it, says what was found and what would do."""


def _setting(
    default: Any,
    help_: str,
    *,
    group: str,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Sequence[str] = (),
    secret: bool = False,
) -> Any:
    metadata = {"help": help_, "group": group, "low": low, "high": high, "choices": tuple(choices)}
    return field(default=default, repr=not secret, metadata=metadata)


# A setting's subject: `--help` lists the flags under it.
_listening = partial(_setting, group="Where to listen")
_access = partial(_setting, group="Who may call")
_records = partial(_setting, group="Where people are stored")
_model = partial(_setting, group="The face model")
_decision = partial(_setting, group="Decisions")
_check = partial(_setting, group="Limits of the checks")
_load = partial(_setting, group="Load and uploads")
_keeping = partial(_setting, group="Logs and how long data is kept")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator can set. Each field is an environment variable in capitals and a flag with dashes.

    Similarities are on the API's scale: -1...1, where 0.5 is the usual threshold for every model. Each limit of a check
    is in the unit of its measure in `face_checks.py`. docs/checks.md has the measurements behind the defaults.
    """

    host: str = _listening("127.0.0.1", "address to listen on")
    port: int = _listening(5000, "port; 0 takes a free one", low=0, high=65535)
    try_page: str = _listening("on", "the camera page GET /try: on or off", choices=("on", "off"))
    trusted_proxies: int = _listening(0, "reverse proxies whose X-Forwarded are believed", low=0, high=9)
    debug: bool = _listening(False, "Flask's own server and debug logging")

    api_keys: str = _access("", "hashes of API keys, beside those in the file")
    api_keys_file: str = _access("", "file of the API keys' hashes; empty: DATA_DIR/keys")
    allow_no_keys: bool = _access(False, "serve other machines without API keys")
    rate_limit_key: str = _access("6000/minute", "requests of an API key, or off")
    rate_limit_address: str = _access("600/minute", "requests of an address, or off")
    lockout: str = _access("10/15 minutes", "failed 1:1 verifications, or off")
    limits_storage: str = _access("memory://", "where limits are counted", secret=True)
    cors_origins: str = _access("", "web origins that may call, with commas between")

    mongo_uri: str = _records("", "MongoDB's connection string; empty: SQLite file", secret=True)
    mongo_db: str = _records("face_recognition", "MongoDB database")
    mongo_collection: str = _records("faces", "MongoDB collection")
    store_wait_s: float = _records(60.0, "seconds to wait for a database at start", low=0, high=3600)
    template_keys: str = _records("", "encryption keys for templates, newest first", secret=True)
    plain_templates: str = _records("read", "unencrypted templates: read or refuse", choices=("read", "refuse"))
    data_dir: Path = _records(PROJECT / "data", "folder of the SQLite file and the snapshot")
    gallery_snapshot: str = _records("on", "a copy of the gallery in DATA_DIR: on or off", choices=("on", "off"))
    search: str = _records(
        "memory",
        "memory, mongodb or mongodb-approximate",
        choices=("memory", "mongodb", "mongodb-approximate"),
    )

    face_model: str = _model("auto", "auto, auraface, compact or a pack's folder")
    face_detector: str = _model("auto", "yunet, pack, or auto", choices=("auto", "yunet", "pack"))
    models_dir: Path = _model(PROJECT / "models", "folder of the models")
    hub_timeout_s: float = _model(10.0, "seconds until a silent hub is unreachable", low=0.5, high=15)
    plain_model: str = _model("", "model of records without a model name")
    embedding_precision: str = _model("fp32", "fp32, bf16 or int8 for the recogniser", choices=("fp32", "bf16", "int8"))
    ort_providers: str = _model("auto", "cpu, cuda, or auto: CUDA if it is there", choices=("auto", "cpu", "cuda"))
    liveness: str = _model(
        "off",
        "photo of a photo: off, observe or enforce",
        choices=("off", "observe", "enforce"),
    )

    challenge: str = _decision(
        "accept", "several frames of a person: off, accept or require", choices=("off", "accept", "require")
    )
    challenge_sign_up: str = _decision("", "for /signUp alone [CHALLENGE]", choices=("off", "accept", "require"))
    challenge_verify: str = _decision("", "for /verify alone [CHALLENGE]", choices=("off", "accept", "require"))
    verify_threshold: float = _decision(0.5, "lowest similarity that /verify accepts", low=-1, high=1)
    duplicate_threshold: float = _decision(math.nan, "of a duplicate sign-up [VERIFY_THRESHOLD]", low=-1, high=1)
    max_photos: int = _decision(5, "photos of a person; one more replaces the oldest", low=1, high=100)
    update_template: str = _decision(
        "off", "add a better photo of a verified person: off or on_verify", choices=("off", "on_verify")
    )
    threshold_floor: float = _decision(math.nan, "lowest that a caller may ask for [0.4]", low=-1, high=1)

    min_face_ratio: float = _check(0.3, "ignored if narrower: share of the widest face", low=0, high=1)
    min_inter_eye_px: float = _check(16.0, "inter-eye distance / cos(yaw), pixels", low=0, high=1000)
    max_head_size: float = _check(1.3, "eyes-to-chin distance / photo height", low=0.1, high=10)
    min_face_in_frame: float = _check(0.72, "share of the face inside the photo", low=0, high=1)
    min_sharpness: float = _check(32.0, "sharpness score; 100: a usual photo", low=0, high=1000)
    min_luminance: float = _check(0.07, "mean luminance of the face", low=0, high=1)
    max_under_exposure: float = _check(0.95, "share of face pixels in luminance 0...25", low=0, high=1)
    max_luminance: float = _check(0.94, "mean luminance of the face", low=0, high=1)
    max_over_exposure: float = _check(0.7, "share of pixels in luminance 247...255", low=0, high=1)
    min_dynamic_range: float = _check(4.2, "entropy of the luminance, bits", low=0, high=8)
    min_uniformity: float = _check(0.1, "darker cheek's luminance / lighter cheek's", low=0, high=1)
    max_roll_deg: float = _check(45.0, "head tilted to a shoulder, degrees", low=1, high=180)
    max_yaw_deg: float = _check(45.0, "head turned aside, degrees", low=1, high=90)
    max_pitch_deg: float = _check(45.0, "head raised or lowered, degrees", low=1, high=90)
    max_colour_distance: float = _check(25.0, "CIELAB a*, b* from natural skin", low=0, high=150)
    max_mask: float = _check(0.06, "probability of a mask", low=0, high=1)
    max_sunglasses: float = _check(0.2, "probability of sunglasses", low=0, high=1)
    max_covered: float = _check(0.25, "probability of another covering", low=0, high=1)
    max_hidden: float = _check(0.97, "probability that landmarks are hidden", low=0, high=1)
    max_eyes_shut: float = _check(0.65, "probability of shut eyes", low=0, high=1)
    max_stretch: float = _check(1.45, "width / height against an unstretched face", low=1, high=10)
    min_likeness: float = _check(0.63, "estimated cosine to the undamaged photo", low=-1, high=1)
    max_damage: float = _check(0.6, "probability that the photo is damaged", low=0, high=1)
    min_liveness: float = _check(0.8, "probability of a live face", low=0, high=1)

    max_file_bytes: int = _load(8 * 1024 * 1024, "largest photo file, bytes", low=1024, high=256 * 1024 * 1024)
    max_image_pixels: int = _load(40_000_000, "most pixels of a photo", low=10_000, high=400_000_000)
    uploads_dir: Path = _load(PROJECT / "uploads", "folder of temporary upload files")
    model_threads: int = _load(0, "threads of one model run; 0: all cores", low=0, high=256)
    model_slots: int = _load(2, "photos in the models at once", low=1, high=256)
    queue_wait_s: float = _load(10.0, "longest wait for a model slot, seconds", low=0, high=600)
    request_threads: int = _load(256, "requests served at once", low=4, high=4096)
    stop_timeout_s: float = _load(30.0, "seconds for open requests at shutdown", low=0, high=600)

    audit: str = _keeping("on", "audit log in DATA_DIR/audit: on or off", choices=("on", "off"))
    audit_days: int = _keeping(365, "days that the audit log is kept", low=1, high=36500)
    retention_days: int = _keeping(0, "days unverified until erasure; 0: never", low=0, high=36500)
    log_format: str = _keeping("text", "text for people, json for machines", choices=("text", "json"))
    log_level: str = _keeping("INFO", "least severe level", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    def __post_init__(self) -> None:
        for of_a_route in ("challenge_sign_up", "challenge_verify"):
            object.__setattr__(self, of_a_route, getattr(self, of_a_route) or self.challenge)
        if math.isnan(self.duplicate_threshold):
            object.__setattr__(self, "duplicate_threshold", self.verify_threshold)
        if math.isnan(self.threshold_floor):
            object.__setattr__(self, "threshold_floor", min(0.4, self.verify_threshold))
        for setting in fields(self):
            _require_in_range(setting, getattr(self, setting.name))
        self._require_safe_uploads_folder()
        self._require_thresholds_in_order()
        self._require_fitting_keys()
        for name, uri in (("MONGO_URI", self.mongo_uri), ("LIMITS_STORAGE", self.limits_storage)):
            _require_escaped_credentials(name, uri)
        if self.model_slots > self.photo_requests:
            raise SettingsError(
                f"MODEL_SLOTS ({self.model_slots}) needs more REQUEST_THREADS than {self.request_threads}: some are "
                "left for requests without a photo"
            )
        if self.search != "memory" and not self.mongo_uri:
            raise SettingsError(f"SEARCH={self.search} needs a MongoDB: give MONGO_URI, or take SEARCH=memory")
        if (self.update_template, self.challenge_sign_up, self.challenge_verify) == ("on_verify", "require", "off"):
            raise SettingsError(
                "UPDATE_TEMPLATE=on_verify would store no photo: CHALLENGE_SIGN_UP=require lets none in without a "
                "challenge, and CHALLENGE_VERIFY=off takes none"
            )

    def _require_safe_uploads_folder(self) -> None:
        """Refuse a folder of uploads that is or contains what must not be deleted, links followed."""
        uploads = self.uploads_dir.resolve()
        api_keys_file = Path(self.api_keys_file).expanduser() if self.api_keys_file else self.data_dir / "keys"
        kept = [PROJECT, ENV_FILE, self.data_dir, self.models_dir, api_keys_file]
        kept += [self.data_dir / "audit", self.data_dir / "gallery", self.data_dir / "faces.sqlite3"]
        for path in kept:
            resolved = path.resolve()
            if uploads == resolved or uploads in resolved.parents:
                raise SettingsError(
                    f"UPLOADS_DIR ({self.uploads_dir}) holds {path}, and the service deletes files there at start: "
                    "give the uploads a folder of their own"
                )

    def _require_thresholds_in_order(self) -> None:
        if self.threshold_floor > self.verify_threshold:
            raise SettingsError(
                f"THRESHOLD_FLOOR ({self.threshold_floor}) is above VERIFY_THRESHOLD ({self.verify_threshold}): "
                "lower the floor or raise the threshold"
            )

    def _require_fitting_keys(self) -> None:
        """Refuse encryption keys that cannot be used, alone or with the other settings."""
        try:
            keyring = self.keyring
        except ValueError as error:
            raise SettingsError(f"TEMPLATE_KEYS cannot be used: {error}") from error
        if not keyring and not keyring.plain_too:
            raise SettingsError("PLAIN_TEMPLATES=refuse needs TEMPLATE_KEYS: without them no template is encrypted")
        if keyring and self.search != "memory":
            raise SettingsError(
                f"SEARCH={self.search} keeps templates as MongoDB's index needs them, unencrypted: "
                "leave TEMPLATE_KEYS empty, or take SEARCH=memory"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK_NAMES and not self.trusted_proxies

    @property
    def photo_requests(self) -> int:
        """How many requests with photos are served or wait at once: an eighth of the threads is left for others."""
        return self.request_threads - max(2, self.request_threads // 8)

    @property
    def keyring(self) -> encryption.Keyring:
        """The keys of TEMPLATE_KEYS; ValueError as `encryption.parse_keys`."""
        return replace(encryption.parse_keys(self.template_keys), plain_too=self.plain_templates == "read")


def _require_in_range(setting: Field[Any], value: Any) -> None:
    low, high, choices = (setting.metadata[key] for key in ("low", "high", "choices"))
    name = setting.name.upper()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value <= high:
        raise SettingsError(f"{name} is {value}; it must lie between {low:g} and {high:g}")
    if choices and value not in choices:
        raise SettingsError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _require_escaped_credentials(name: str, uri: str) -> None:
    """Refuse a user name or password with an unescaped character, which would become part of a host name.

    Drivers look host names up and log them. The message shows nothing of the string.
    """
    credentials, at, hosts = uri.partition("://")[2].rpartition("@")
    if at and (re.search(r"[@/?#\[\]]|:.*:|%(?![0-9A-Fa-f]{2})", credentials) or not hosts):
        raise SettingsError(
            f"{name} has a character in its user name or password that must be percent-encoded: @ as %40, / as %2F, "
            ": as %3A, % as %25, ? as %3F, # as %23"
        )


_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)
    return value


def _parse(setting: Field[Any], text: str) -> Any:
    name, kind = setting.name.upper(), str(setting.type)
    text = text.strip()
    try:
        if kind == "bool":
            return _SWITCH[text.lower()]
        if kind == "Path":
            return Path(text).expanduser().resolve()
        parsers: dict[str, Callable[[str], Any]] = {"int": int, "float": _number, "str": str}
        return parsers[kind](text)
    except (ValueError, KeyError) as error:
        # A value is shown only where it cannot be a secret: numbers and switches, never strings.
        raise SettingsError(f"{name} is {text!r}, which is not a {kind}") from error


def add_flags(parser: argparse.ArgumentParser, *, shown: bool = True) -> None:
    """Give `parser` one flag for every setting, grouped by subject; an unused flag adds nothing to the namespace.

    Args:
        parser: of the service, or of a command.
        shown: whether `--help` lists the flags.
    """
    for group, members in groupby(fields(Settings), lambda setting: setting.metadata["group"]):
        section = parser.add_argument_group(group) if shown else parser
        for setting in members:
            flag = "--" + setting.name.replace("_", "-")
            help_ = _flag_help(setting) if shown else argparse.SUPPRESS
            if str(setting.type) == "bool":
                section.add_argument(flag, action="store_const", const="true", default=argparse.SUPPRESS, help=help_)
            else:
                section.add_argument(flag, metavar="", default=argparse.SUPPRESS, help=help_)


def _flag_help(setting: Field[Any]) -> str:
    """A flag's line in `--help`, with its default in brackets."""
    default: Any = setting.default
    help_: str = setting.metadata["help"]
    if isinstance(default, Path):
        default = f"{default.relative_to(PROJECT)}/"
    elif isinstance(default, float):
        default = "" if math.isnan(default) else f"{default:g}"
    elif isinstance(default, bool):
        default = ""
    return (help_ if default == "" else f"{help_} [{default}]").replace("%", "%%")


def known_names() -> list[str]:
    """The names that the environment and `.env` may hold: each setting's, and NAME_FILE for a file with its value."""
    names = [setting.name.upper() for setting in fields(Settings)]
    return names + [f"{name}_FILE" for name in names if f"{name}_FILE" not in names]


def _secret_names() -> list[str]:
    """The settings whose values nobody may see."""
    return [setting.name.upper() for setting in fields(Settings) if not setting.repr]


def read_settings_file(path: Path | None = ENV_FILE) -> EnvFile:
    """The `.env` file, an empty one for None; SettingsError if it cannot be used, or a name in it is a mistake."""
    if path is None:
        return EnvFile(ENV_FILE)
    try:
        return read_env_file(path, known_names())
    except EnvFileError as error:
        raise SettingsError(str(error)) from error


def settings_warnings(environ: Mapping[str, str] | None = None, path: Path | None = ENV_FILE) -> list[str]:
    """What an operator should know about the environment and `.env`, one line each; SettingsError.

    Args:
        environ: the environment; the process's own if omitted.
        path: the `.env` file.
    """
    environ = os.environ if environ is None else environ
    file, known = read_settings_file(path), known_names()
    lines = []
    if file.unknown:
        lines.append(f"{file.path} has names that nothing here reads: {', '.join(file.unknown)}")
    secrets = [
        setting.name.upper()
        for setting in fields(Settings)
        if not setting.repr and file.values.get(setting.name.upper())
    ]
    if secrets and file.readable_by_others:
        lines.append(
            f"{file.path} holds secrets ({', '.join(secrets)}), and other users of this machine can read it: "
            f"chmod 600 {file.path}"
        )
    for name in sorted(set(environ) - set(known)):
        meant = None if name.startswith(HUB_PREFIX) else name_meant(name, known)
        if meant is not None and meant not in environ:
            lines.append(f"The environment has {name}, which nothing here reads. Did you mean {meant}?")
    return lines


def _value_in(source: Mapping[str, str | None], name: str) -> str | None:
    """A setting's text in one source, or in the file that NAME_FILE names there; None if the source has neither."""
    value, file = source.get(name), source.get(f"{name}_FILE")
    if value or not file or f"{name}_FILE".lower() in Settings.__dataclass_fields__:
        return value
    try:
        return Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}_FILE names a file that cannot be read ({type(error).__name__})") from error


def load_settings(
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = ENV_FILE,
) -> Settings:
    """Read the settings: flag > environment > `.env` > default.

    The first source that names a setting decides, and an empty value there means the default. In the environment and in
    `.env`, NAME_FILE names a file that holds the value of NAME, as container secrets do.

    Args:
        flags: setting name -> text, as `vars()` of a parser that `add_flags` prepared.
        environ: the environment; the process's own when omitted.
        env_file: the `.env` file, which may be missing; None reads none.

    Raises:
        SettingsError: a value of the wrong type or out of its range; a `.env` that cannot be used.
    """
    environ = os.environ if environ is None else environ
    from_file = read_settings_file(env_file).values
    values: dict[str, Any] = {}
    for setting in fields(Settings):
        name = setting.name.upper()
        named = [
            value
            for value in ((flags or {}).get(setting.name), _value_in(environ, name), _value_in(from_file, name))
            if value is not None
        ]
        if named and named[0].strip():
            values[setting.name] = _parse(setting, named[0])
    return Settings(**values)
