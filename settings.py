"""Owns every tunable: one frozen `Settings`, read from flag > environment > `.env` > default, checked at start."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from store import encryption

PROJECT = Path(__file__).resolve().parent


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it, says what was found and what would do."""


def _setting(
    default: Any,
    help_: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Sequence[str] = (),
    secret: bool = False,
) -> Any:
    return field(
        default=default, repr=not secret, metadata={"help": help_, "low": low, "high": high, "choices": tuple(choices)}
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator can set. Each field is an environment variable in capitals and a flag with dashes.

    Similarities are on the API's scale (-1...1, 0.5 the middle of the road for every model); each limit of a check
    is in the unit of its measure in `face_checks.py`; docs/checks.md has the measurements that the defaults rest on.
    """

    host: str = _setting("127.0.0.1", "address to listen on; anything but loopback exposes the service")
    port: int = _setting(5000, "port to listen on; 0 takes a free one", low=0, high=65535)
    debug: bool = _setting(False, "Flask's own server and debug logging; never in production")

    api_keys: str = _setting(
        "", "hashes of API keys, as `python app.py keys add --print-line` shows them; beside those of API_KEYS_FILE"
    )
    api_keys_file: str = _setting("", "where `python app.py keys` keeps the keys' hashes; empty: keys, in DATA_DIR")
    allow_no_keys: bool = _setting(False, "serve addresses other than loopback without any API key")
    rate_limit_key: str = _setting("6000/minute", "requests that one API key may make; off: any number")
    rate_limit_address: str = _setting("600/minute", "requests that one address may make; off: any number")
    lockout: str = _setting("10/15 minutes", "failed 1:1 verifications after which a user_id is locked out; off: never")
    limits_storage: str = _setting(
        "memory://", "where limits are counted: memory://, or for all replicas redis:// or mongodb://", secret=True
    )
    trusted_proxies: int = _setting(
        0, "reverse proxies in front, whose X-Forwarded headers are believed", low=0, high=9
    )
    cors_origins: str = _setting("", "web origins that may call, separated by commas; empty: none")

    mongo_uri: str = _setting(
        "",
        "MongoDB connection string (a flag shows in the process list: prefer .env); empty: an embedded SQLite file",
        secret=True,
    )
    mongo_db: str = _setting("face_recognition", "MongoDB database")
    mongo_collection: str = _setting("faces", "MongoDB collection")
    template_keys: str = _setting(
        "",
        "keys that encrypt templates at rest, in base64, the newest first (a flag shows in the process list)",
        secret=True,
    )
    plain_templates: str = _setting(
        "read",
        "what a template is that is not encrypted: read; or refuse, once `rotate-keys` has been over all of them",
        choices=("read", "refuse"),
    )
    data_dir: Path = _setting(PROJECT / "data", "folder of the embedded store and of the gallery's snapshot")
    gallery_snapshot: str = _setting(
        "on", "on: templates are also kept in DATA_DIR, for a quick start; off: none there", choices=("on", "off")
    )
    uploads_dir: Path = _setting(PROJECT / "uploads", "folder for whatever of an upload must touch the disk")
    search: str = _setting(
        "memory",
        "memory; or mongodb, mongodb-approximate: MongoDB's own vector index searches",
        choices=("memory", "mongodb", "mongodb-approximate"),
    )
    store_wait_s: float = _setting(60.0, "seconds to keep trying a database that is down at start", low=0, high=3600)

    face_model: str = _setting("auto", "auto, auraface, compact, or the folder of an InsightFace pack")
    face_detector: str = _setting(
        "auto",
        "what finds faces: yunet, the compact model's; pack, the model's own; auto: yunet for AuraFace, else pack",
        choices=("auto", "yunet", "pack"),
    )
    models_dir: Path = _setting(
        PROJECT / "models", "folder of the models; AuraFace lives in its auraface/, the compact model in its compact/"
    )
    hub_timeout_s: float = _setting(10.0, "seconds after which a silent model hub is unreachable", low=0.5, high=15)
    plain_model: str = _setting(
        "", "model that made the records without a model name; empty: the running one, if the dimension is equal"
    )
    embedding_precision: str = _setting(
        "fp32",
        "of the recogniser: fp32; bf16 in half the time, as exact; int8 in a third, nearly as exact",
        choices=("fp32", "bf16", "int8"),
    )
    ort_providers: str = _setting(
        "auto", "what runs the models: cpu, cuda, or auto: CUDA if onnxruntime has it", choices=("auto", "cpu", "cuda")
    )
    model_threads: int = _setting(0, "threads of one model run; 0: as many as there are cores", low=0, high=256)
    model_slots: int = _setting(2, "photos that are in the models at once", low=1, high=256)
    request_threads: int = _setting(32, "requests served at once", low=2, high=512)
    queue_limit: int = _setting(24, "requests that may wait for a model slot before 503 overloaded", low=0, high=4096)
    stop_timeout_s: float = _setting(30.0, "seconds that requests in hand get at shutdown", low=0, high=600)

    verify_threshold: float = _setting(0.5, "similarity from which /verify matches", low=-1, high=1)
    duplicate_threshold: float = _setting(
        math.nan, "similarity from which /signUp refuses a duplicate; default: the verify threshold", low=-1, high=1
    )
    threshold_floor: float = _setting(
        math.nan,
        "lowest threshold that a caller may ask for; default: 0.4, or VERIFY_THRESHOLD if lower",
        low=-1,
        high=1,
    )

    max_file_bytes: int = _setting(8 * 1024 * 1024, "largest photo file", low=1024, high=256 * 1024 * 1024)
    max_image_pixels: int = _setting(40_000_000, "most pixels of a photo", low=10_000, high=400_000_000)

    min_face_ratio: float = _setting(
        0.0, "faces narrower than this share of the widest one are ignored; 0: every face counts", low=0, high=1
    )
    min_inter_eye_px: float = _setting(16.0, "inter-eye distance / cos(yaw)", low=0, high=1000)
    max_head_size: float = _setting(1.3, "eyes-to-chin distance / photo height", low=0.1, high=10)
    min_face_in_frame: float = _setting(0.72, "share of the face region that is inside the photo", low=0, high=1)
    min_sharpness: float = _setting(32.0, "sharpness score; 100 is a usual sharp photo", low=0, high=1000)
    min_luminance: float = _setting(0.07, "mean luminance of the face", low=0, high=1)
    max_under_exposure: float = _setting(0.95, "share of face pixels in luminance 0...25", low=0, high=1)
    max_luminance: float = _setting(0.94, "mean luminance of the face", low=0, high=1)
    max_over_exposure: float = _setting(0.7, "share of face pixels in luminance 247...255", low=0, high=1)
    min_dynamic_range: float = _setting(4.2, "entropy of the face's luminance in bits", low=0, high=8)
    min_uniformity: float = _setting(0.1, "darker cheek's luminance / lighter cheek's", low=0, high=1)
    max_roll_deg: float = _setting(45.0, "head tilted to a shoulder, degrees", low=1, high=180)
    max_yaw_deg: float = _setting(45.0, "head turned aside, degrees", low=1, high=90)
    max_pitch_deg: float = _setting(45.0, "head raised or lowered, degrees", low=1, high=90)
    max_colour_distance: float = _setting(
        25.0, "distance of the cheeks' CIELAB a*, b* from natural skin", low=0, high=150
    )
    max_hidden: float = _setting(0.95, "probability that eyes, nose or mouth are hidden", low=0, high=1)
    max_mask: float = _setting(0.2, "probability of a mask", low=0, high=1)
    max_sunglasses: float = _setting(0.34, "probability of sunglasses", low=0, high=1)
    max_covered: float = _setting(0.65, "probability of another covering", low=0, high=1)

    audit: str = _setting(
        "on", "on: who enrolled, verified, compared and erased whom, in DATA_DIR/audit; off", choices=("on", "off")
    )
    audit_days: int = _setting(365, "days for which the audit log is kept", low=1, high=36500)
    retention_days: int = _setting(
        0, "erase people who were not verified for so many days; 0: nobody", low=0, high=36500
    )

    liveness: str = _setting(
        "off",
        "whether a photo of a photo is told from a person: off, observe (only logged), enforce",
        choices=("off", "observe", "enforce"),
    )
    min_liveness: float = _setting(0.8, "probability from which a face is live", low=0, high=1)

    try_page: str = _setting("on", "GET /try: a page to sign up and verify with a camera; off", choices=("on", "off"))

    log_format: str = _setting("text", "one line for people, or one JSON object", choices=("text", "json"))
    log_level: str = _setting("INFO", "least severe level logged", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    def __post_init__(self) -> None:
        if math.isnan(self.duplicate_threshold):
            object.__setattr__(self, "duplicate_threshold", self.verify_threshold)
        if math.isnan(self.threshold_floor):
            object.__setattr__(self, "threshold_floor", min(0.4, self.verify_threshold))
        for setting in fields(self):
            _check(setting, getattr(self, setting.name))
        for kept in (PROJECT, self.data_dir, self.models_dir):
            if self.uploads_dir == kept or self.uploads_dir in kept.parents:
                raise SettingsError(
                    f"UPLOADS_DIR ({self.uploads_dir}) holds {kept}, and everything in it is deleted at start: "
                    "give the uploads a folder of their own"
                )
        if self.model_slots + self.queue_limit >= self.request_threads:
            raise SettingsError(
                f"MODEL_SLOTS ({self.model_slots}) + QUEUE_LIMIT ({self.queue_limit}) must stay below REQUEST_THREADS "
                f"({self.request_threads}), so that GET / is answered while every slot and place is taken"
            )
        if self.search != "memory" and not self.mongo_uri:
            raise SettingsError(f"SEARCH={self.search} needs a MongoDB: give MONGO_URI, or take SEARCH=memory")
        try:
            keyring = self.keyring
        except ValueError as error:
            raise SettingsError(f"TEMPLATE_KEYS cannot be used: {error}") from error
        if not keyring and not keyring.plain_too:
            raise SettingsError("PLAIN_TEMPLATES=refuse needs TEMPLATE_KEYS: without keys every template is plain")
        if keyring and self.search != "memory":
            raise SettingsError(
                f"SEARCH={self.search} keeps templates as MongoDB's index needs them, unencrypted: "
                "leave TEMPLATE_KEYS empty, or take SEARCH=memory"
            )
        if self.threshold_floor > self.verify_threshold:
            raise SettingsError(
                f"THRESHOLD_FLOOR ({self.threshold_floor}) is above VERIFY_THRESHOLD ({self.verify_threshold}): "
                "lower the floor or raise the threshold"
            )

    @property
    def keyring(self) -> encryption.Keyring:
        """The keys of TEMPLATE_KEYS; ValueError as `encryption.parse_keys`."""
        return replace(encryption.parse_keys(self.template_keys), plain_too=self.plain_templates == "read")


def _check(setting: Field[Any], value: Any) -> None:
    low, high, choices = (setting.metadata[key] for key in ("low", "high", "choices"))
    name = setting.name.upper()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value <= high:
        raise SettingsError(f"{name} is {value}; it must lie between {low:g} and {high:g}")
    if choices and value not in choices:
        raise SettingsError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


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
    """Give `parser` one flag for every setting; a flag that is not used leaves no trace in the namespace.

    Args:
        parser: of the service, or of a command.
        shown: whether `--help` lists them.
    """
    for setting in fields(Settings):
        flag = "--" + setting.name.replace("_", "-")
        default = "" if str(setting.default) in ("", "nan") else f" (default: {setting.default})"
        help_ = (setting.metadata["help"] + default).replace("%", "%%") if shown else argparse.SUPPRESS
        if str(setting.type) == "bool":
            parser.add_argument(flag, action="store_const", const="true", default=argparse.SUPPRESS, help=help_)
        else:
            parser.add_argument(flag, metavar="VALUE", default=argparse.SUPPRESS, help=help_)


def read_env_file(env_file: Path | None = PROJECT / ".env") -> dict[str, str | None]:
    """The `.env` file's lines, none if there is no file; SettingsError if it cannot be read, or is no UTF-8 text."""
    try:
        return dotenv_values(env_file) if env_file is not None and env_file.is_file() else {}
    except UnicodeDecodeError as error:
        raise SettingsError(f"{env_file} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise SettingsError(f"{env_file} cannot be read ({error.strerror})") from error


def _value_in(source: Mapping[str, str | None], name: str) -> str | None:
    """What a source says of a setting, itself or by a file that it names."""
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
    env_file: Path | None = PROJECT / ".env",
) -> Settings:
    """Read the settings: flag > environment > `.env` > default; the first that names a
    setting decides, and an empty value there asks for the default. In the environment and in `.env`, NAME_FILE names a
    file that holds the value of NAME, as container secrets do.

    Args:
        flags: setting name -> text, as `vars()` of a parser that `add_flags` prepared.
        environ: the environment; the process's own when omitted.
        env_file: the `.env` file; missing is fine.

    Raises:
        SettingsError: a value of the wrong type or out of its range.
    """
    environ = os.environ if environ is None else environ
    from_file = read_env_file(env_file)
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
