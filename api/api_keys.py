"""The API keys: their names, scopes and hashes, read from the settings and from the keys' file."""

from __future__ import annotations

import base64
import datetime
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from settings import Settings, SettingsError

SCOPES: Mapping[str, str] = MappingProxyType(
    {"app": "sign up, verify, compare, analyze", "ops": "users, erasure, metrics"}
)
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PREFIX = "fk_"
_LINE = re.compile(
    rf"(?P<name>{NAME.pattern}):(?P<scopes>[a-z+]+):(?P<sha256>[0-9a-f]{{64}})(:(?P<added>[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}))?"
)


class ApiKeysError(ValueError):
    """API keys that cannot be used; the message names the line but never shows it."""


@dataclass(frozen=True)
class ApiKey:
    """What the service stores about one API key.

    Args:
        name: the operator's name for it; the logs show it.
        scopes: some of `SCOPES`.
        sha256: hash of the secret, in hexadecimal. A plain hash is enough: the secret is 256 random bits, which nobody
            can guess. (OWASP asks for slow hashes where people choose the secret.)
        added: the day on which it was made, as YYYY-MM-DD in UTC; empty if unknown.
    """

    name: str
    scopes: frozenset[str]
    sha256: str
    added: str = ""

    def line(self) -> str:
        """The API key as the file and API_KEYS hold it."""
        parts = [self.name, "+".join(sorted(self.scopes)), self.sha256, self.added]
        return ":".join(parts).rstrip(":")


def new_api_key(name: str, scopes: Sequence[str]) -> tuple[str, ApiKey]:
    """Make an API key. Returns the secret, which the service never stores, and what it does store."""
    secret = _PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return secret, ApiKey(name, frozenset(scopes), hashlib.sha256(secret.encode()).hexdigest(), today)


def parse(text: str) -> list[ApiKey]:
    """Read API keys, one a line or separated by commas, as `name:scope+scope:sha256[:date]`; `#` begins a comment.

    Raises:
        ApiKeysError: a line that is not an API key, or a name that occurs twice.
    """
    api_keys: list[ApiKey] = []
    for number, written in enumerate(text.replace(",", "\n").splitlines(), 1):
        line = written.partition("#")[0].strip()
        if not line:
            continue
        parts = _LINE.fullmatch(line)
        scopes = frozenset(parts["scopes"].split("+")) if parts else frozenset()
        if parts is None or not scopes <= SCOPES.keys():
            raise ApiKeysError(f"line {number} is not name:scopes:sha256 (scopes: {', '.join(SCOPES)}, joined by +)")
        api_keys.append(ApiKey(parts["name"], scopes, parts["sha256"], parts["added"] or ""))
    if len({api_key.name for api_key in api_keys}) < len(api_keys):
        raise ApiKeysError("two API keys have the same name")
    return api_keys


def parse_setting(text: str) -> list[ApiKey]:
    """Read the API keys of the setting API_KEYS; SettingsError as `parse`."""
    try:
        return parse(text)
    except ApiKeysError as error:
        raise SettingsError(f"API_KEYS: {error}") from error


class KeyChain:
    """The API keys of API_KEYS and of the keys' file. The file is read again when it changes. Safe for many threads.

    Raises:
        SettingsError: API keys that cannot be read, at start.
    """

    def __init__(self, settings: Settings) -> None:
        self._fixed = parse_setting(settings.api_keys)
        self._path = file_of(settings)
        self._lock = threading.Lock()
        self._stamp: object = None
        self._api_keys: list[ApiKey] = []
        # From the first API key on this holds until the service ends: a file that is lost must not open the service.
        self.needed = False
        try:
            self.current()
        except ApiKeysError as error:
            raise SettingsError(f"{self._path}: {error}") from error

    def current(self) -> list[ApiKey]:
        """The API keys as they are now; ApiKeysError while the file cannot be read."""
        stamp = _stamp_of(self._path)
        with self._lock:
            if stamp != self._stamp or self._stamp is None:
                try:
                    text = self._path.read_text("utf-8") if stamp else ""
                except (OSError, UnicodeDecodeError) as error:
                    raise ApiKeysError("the file cannot be read") from error
                self._api_keys = self._fixed + parse(text)
                self._stamp = stamp
                self.needed = bool(self._api_keys) or self.needed
            return self._api_keys

    def find(self, secret: str) -> ApiKey | None:
        """The API key with this secret, None if there is none; ApiKeysError. Compares every key, in constant time."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        found = None
        for api_key in self.current():
            if hmac.compare_digest(api_key.sha256, digest):
                found = api_key
        return found


def file_of(settings: Settings) -> Path:
    """The file of the API keys: API_KEYS_FILE, or `keys` in DATA_DIR."""
    return Path(settings.api_keys_file).expanduser() if settings.api_keys_file else settings.data_dir / "keys"


def read_file(path: Path) -> list[ApiKey]:
    """The API keys in the file, none if there is no file; ApiKeysError, OSError."""
    return parse(path.read_text("utf-8")) if path.exists() else []


@contextmanager
def editing(path: Path) -> Iterator[list[ApiKey]]:
    """Yield the file's API keys as a list to change, then replace the file with that list.

    A lock file beside it lets one command edit at a time: no command writes back what another has just revoked. The
    file is replaced in one step, mode 0600: a service reads the old or the new one, never a part. If the block raises,
    nothing is written.

    Raises:
        ApiKeysError, OSError: the file cannot be read or written.
    """
    path = path.resolve()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        api_keys = read_file(path)
        yield api_keys
        _replace(path, api_keys)


def _replace(path: Path, api_keys: Sequence[ApiKey]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".keys-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{api_key.line()}\n" for api_key in api_keys)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _stamp_of(path: Path) -> object:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ApiKeysError("the file cannot be read") from error
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
