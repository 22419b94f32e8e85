"""Verifies the model files by their digests, and fetches those that are missing or damaged from the hub."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

PARTIAL = ".partial"  # hidden folder, in the model's own folder, where unverified files lie; nothing loads from it


class ModelUnavailable(Exception):  # noqa: N818 - said to an operator as a state of affairs
    """The model cannot be had; the message tells the operator what is wrong and what to do next."""


@dataclass(frozen=True)
class ModelFile:
    """One file of a model: its name, bytes, SHA-256 (hex), InsightFace task, and repository on the hub."""

    name: str
    size: int
    sha256: str
    task: str
    repo: str


AURAFACE_REPO = "fal/AuraFace-v1"
AURAFACE: tuple[ModelFile, ...] = (
    ModelFile(
        name="scrfd_10g_bnkps.onnx",
        size=16923827,
        sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
        task="detection",
        repo=AURAFACE_REPO,
    ),
    ModelFile(
        name="glintr100.onnx",
        size=260694151,
        sha256="a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60",
        task="recognition",
        repo=AURAFACE_REPO,
    ),
)


@dataclass(frozen=True)
class HashedFile:
    """A file that was read for its SHA-256.

    Attributes:
        path: the file.
        sha256: of its bytes, hexadecimal.
        state: its `state` before they were read.
    """

    path: Path
    sha256: str
    state: tuple[int, ...]

    def require_unchanged(self) -> None:
        """Raise ModelUnavailable unless whatever was loaded from the path since are the bytes that were digested."""
        try:
            # A backup's hard link or a chmod touches a file, too, and changes nothing of it.
            unchanged = state(self.path) == self.state or sha256_of(self.path) == self.sha256
        except OSError:
            unchanged = False
        if not unchanged:
            raise ModelUnavailable(f"{self.path} was changed while it was loaded: start again once it is in place.")


def state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced by another; OSError where it cannot be asked for."""
    found = path.stat()
    # Nobody can set the last of these back. The file's number is left out: on some network mounts it does not last.
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def hashed_file(path: Path) -> HashedFile:
    """Read a file for its SHA-256. Raises OSError."""
    before = state(path)
    return HashedFile(path, sha256_of(path), before)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits. Raises OSError."""
    sha256 = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def ensure(
    folder: Path, files: Sequence[ModelFile] = AURAFACE, *, hub_timeout_s: float = 15.0
) -> dict[str, HashedFile]:
    """See to it that every file lies in `folder` with its right SHA-256.

    Files that are right already need neither network nor write access. The others are taken from the hub library's
    own cache (`HF_HOME`) or fetched from the hub (`HF_ENDPOINT`), verified, and only then moved under their names;
    one that is still wrong when it was fetched a second time is refused. Several processes may do this at once.

    Args:
        folder: created where it does not exist.
        files: what is needed; nothing else of their repositories is fetched.
        hub_timeout_s: seconds after which a hub that has not answered counts as unreachable. A download that goes on,
            however slowly, is not cut short by it.

    Returns:
        The right files by their tasks. The caller loads a file, and then asks it whether it is unchanged.

    Raises:
        ModelUnavailable: a file cannot be had.
    """
    why = ""
    try:
        right, problems = _verify_all(files, folder)
        if problems:
            why = _repair(folder, files, hub_timeout_s)
            right, problems = _verify_all(files, folder)
    except OSError as error:
        raise ModelUnavailable(f"The model files in {folder} cannot be read or written: {error}") from error
    if problems:
        state = "".join(f"\n  {file.name}: {problem}" for file, problem in problems.items())
        needed = "".join(
            f"\n  {file.name}  {file.size} bytes  SHA-256 {file.sha256}  of {file.repo}" for file in problems
        )
        repos = " and ".join(dict.fromkeys(file.repo for file in files))
        raise ModelUnavailable(
            f"The model {repos} is not complete in {folder}:{state}\n{why}\n"
            "Repair that and start again (HF_ENDPOINT names a mirror of the hub, HTTPS_PROXY a proxy), or put these "
            f"files into that folder by hand:{needed}"
        )
    return right


def _verify_all(files: Sequence[ModelFile], folder: Path) -> tuple[dict[str, HashedFile], dict[ModelFile, str]]:
    """Those files in `folder` that are right, by their tasks, and what is wrong with the others."""
    right: dict[str, HashedFile] = {}
    problems: dict[ModelFile, str] = {}
    for file in files:
        path = folder / file.name
        if not path.is_file():
            problems[file] = "missing"
            continue
        found = hashed_file(path)
        if found.sha256 == file.sha256:
            right[file.task] = found
            continue
        size = path.stat().st_size
        problems[file] = (
            f"damaged ({size} bytes, SHA-256 {found.sha256}; the right one has {file.size} bytes, "
            f"SHA-256 {file.sha256})"
        )
    return right, problems


def _problem_with(file: ModelFile, folder: Path) -> str | None:
    """What is wrong with the file in `folder`; None when it is right."""
    return _verify_all([file], folder)[1].get(file)


def _repair(folder: Path, files: Sequence[ModelFile], hub_timeout_s: float) -> str:
    """Put right what is missing or damaged in `folder`, as far as possible; return why it went no further, or ''."""
    # The library reads its environment when it is imported. Xet, the hub's own storage protocol, keeps a second copy
    # in a cache and retries a stalled line by rules of its own; plain HTTP serves two files as well. Telemetry would
    # ask the hub for a list of coding agents.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import constants, try_to_load_from_cache  # noqa: PLC0415 - slow to import, seldom needed
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415 - re-exported unmarked
            WeakFileLock,
        )
    except ValueError as error:
        return f"The hub library cannot read its environment, HF_ENDPOINT or another variable with HF_: {error}."

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / PARTIAL
    with WeakFileLock(folder / ".lock"):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: a living one would hold the lock
        try:
            partial.mkdir()
            # Judged anew: another process may have mended them while this one waited for the lock.
            wanted = [file for file in files if _problem_with(file, folder)]
            for file in list(wanted):
                cached = try_to_load_from_cache(file.repo, file.name)
                if isinstance(cached, str):
                    shutil.copyfile(cached, partial / file.name)
                    if not _problem_with(file, partial):
                        (partial / file.name).replace(folder / file.name)
                        wanted.remove(file)
            if not wanted:
                return ""
            if constants.is_offline_mode():
                return "Nothing was fetched, since HF_HUB_OFFLINE is set."
            if problem := _hub_problem(wanted[0], hub_timeout_s):
                return f"The hub at {constants.ENDPOINT} cannot be used: {problem}."
            for file in wanted:
                logger.info("fetching %s (%.0f MB) from %s", file.name, file.size / 1e6, constants.ENDPOINT)
                if problem := _fetch(file, folder):
                    return f"Fetching {file.name} from {constants.ENDPOINT} failed: {problem}."
            return ""
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _hub_problem(file: ModelFile, timeout_s: float) -> str | None:
    """Ask the hub for the file's metadata; return why it cannot be had, or None when it can."""
    import httpx2  # noqa: PLC0415 - the hub library's own HTTP client
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # noqa: PLC0415

    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(file.repo, file.name), timeout=timeout_s)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
            answers.put(_in_words(error))  # ImportError: a SOCKS proxy is set, but no library for it is there
        else:
            answers.put(None)

    # The client's timeouts bound each step alone, and the look-up of a name not at all; this bounds the whole.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        return f"it did not answer within {timeout_s:g} seconds"


def _fetch(file: ModelFile, folder: Path) -> str | None:
    """Fetch one file, twice if need be, and move it under its name once it is verified; return what failed, or None.

    The library resumes a download that stalls or ends early, and gives up once about a minute brought nothing new.
    """
    import httpx2  # noqa: PLC0415
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    partial = folder / PARTIAL
    problem = ""
    for _ in range(2):
        try:
            # Forced: otherwise a damaged copy in the cache would be taken, and a silent hub asked for minutes.
            hf_hub_download(file.repo, file.name, local_dir=partial, force_download=True)
            damage = _problem_with(file, partial)
        except httpx2.ReadError as error:  # a connection reset: the one break that the library does not resume from
            problem = _in_words(error)
        except (httpx2.HTTPError, OSError, ValueError) as error:
            return _in_words(error)
        else:
            if damage is None:
                (partial / file.name).replace(folder / file.name)
                return None
            problem = f"it arrived {damage}"
        logger.warning("fetching %s: %s", file.name, problem)
    return f"{problem}, at the second try too"


def _in_words(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    if isinstance(error, ValueError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the library wraps what stopped a forced download
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403, 404):
            return (
                f"it answered HTTP {status}: the repository or the file does not exist there, or is private or gated "
                "(then set HF_TOKEN to a token that may read it)"
            )
        return f"it answered HTTP {status}"
    return f"{type(error).__name__}: {error}".rstrip(".")
