"""The API keys: their names, scopes and hashes, read from the settings and from the keys file."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from settings import Settings, SettingsError

SCOPES: Mapping[str, str] = MappingProxyType(
    {"app": "sign up, verify, compare, analyze", "ops": "users, erasure, metrics"}
)
_PREFIX = "fk_"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")


class KeysError(ValueError):
    """Keys that cannot be used; the message names the line, never what it holds."""


@dataclass(frozen=True)
class Key:
    """What is known of one key.

    Args:
        name: the operator's name for it, which the logs show.
        scopes: some of `SCOPES`.
        sha256: of the key, in hexadecimal. A plain hash is enough: a key is 256 random bits, so that there is
            nothing to guess (OWASP asks for slow hashes where people choose the secret).
    """

    name: str
    scopes: frozenset[str]
    sha256: str

    def line(self) -> str:
        """The key as the file and API_KEYS hold it."""
        return f"{self.name}:{'+'.join(sorted(self.scopes))}:{self.sha256}"


def new_key(name: str, scopes: Sequence[str]) -> tuple[str, Key]:
    """Make a key; returns the secret, which is stored nowhere, and what is stored of it."""
    secret = _PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    return secret, Key(name, frozenset(scopes), hashlib.sha256(secret.encode()).hexdigest())


def parse(text: str) -> list[Key]:
    """Read keys, one to a line or separated by commas, as `name:scope+scope:sha256`; `#` begins a remark.

    Raises:
        KeysError: a line that is none, or a name that is there twice.
    """
    found: list[Key] = []
    for number, written in enumerate(text.replace(",", "\n").splitlines(), 1):
        line = written.partition("#")[0].strip()
        if not line:
            continue
        name, _, rest = line.partition(":")
        scopes, _, digest = rest.partition(":")
        given = frozenset(scopes.split("+"))
        if not NAME.fullmatch(name) or not given <= SCOPES.keys() or not _HASH.fullmatch(digest):
            raise KeysError(f"line {number} is not name:scopes:sha256 (scopes: {', '.join(SCOPES)}, joined by +)")
        found.append(Key(name, given, digest))
    if len({key.name for key in found}) < len(found):
        raise KeysError("two keys have the same name")
    return found


class KeyChain:
    """The keys of API_KEYS and of the keys' file, read again whenever the file changes, for any number of threads.

    Raises:
        SettingsError: keys that cannot be read, at start.
    """

    def __init__(self, settings: Settings) -> None:
        self._fixed = checked("API_KEYS", settings.api_keys)
        self._path = file_of(settings)
        self._lock = threading.Lock()
        self._stamp: object = None
        self._keys: list[Key] = []
        try:
            self.needed = bool(self.current())
        except KeysError as error:
            raise SettingsError(f"{self._path}: {error}") from error

    def current(self) -> list[Key]:
        """The keys as they are now; KeysError while the file cannot be read.

        From the first key on `needed` holds until the service ends, so that a file that vanishes opens no door.
        """
        stamp = _stamp_of(self._path)
        with self._lock:
            if stamp != self._stamp or self._stamp is None:
                try:
                    text = self._path.read_text("utf-8") if stamp else ""
                except (OSError, UnicodeDecodeError) as error:
                    raise KeysError("the file cannot be read") from error
                self._keys = self._fixed + parse(text)
                self._stamp = stamp
                self.needed = bool(self._keys) or getattr(self, "needed", False)
            return self._keys

    def find(self, secret: str) -> Key | None:
        """Return whose key this is, None for nobody's; KeysError. Every key is compared, in constant time."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        found = None
        for key in self.current():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def file_of(settings: Settings) -> Path:
    """Where the keys are kept: API_KEYS_FILE, or `keys` in DATA_DIR."""
    return Path(settings.api_keys_file).expanduser() if settings.api_keys_file else settings.data_dir / "keys"


def _stamp_of(path: Path) -> object:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise KeysError("the file cannot be read") from error
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def checked(name: str, text: str) -> list[Key]:
    try:
        return parse(text)
    except KeysError as error:
        raise SettingsError(f"{name}: {error}") from error


def write(path: Path, keys: Sequence[Key]) -> None:
    """Replace the file in one step, mode 0600: a service that reads meanwhile sees the old or the new one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".keys-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{key.line()}\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
