"""Finds the photos of a bulk command: those of a folder, or those that a CSV lists."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

logger = logging.getLogger(__name__)

# A file with another suffix is not meant as a photo. What such a file holds is decided by decoding it.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif")
# Folders in which network storage, archives and trash bins keep copies and small previews of photos.
SYSTEM_FOLDERS = frozenset({"@eadir", "__macosx", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "@recycle"})
PATH_COLUMNS = ("path", "file", "photo")
USER_ID_COLUMNS = ("user_id", "id")
PERSON_COLUMNS = ("person",)
LIST_COLUMNS = "its first line names its columns: path, and where people are enrolled already, user_id"


@dataclass(frozen=True)
class Photo:
    """One photo of a bulk.

    Attributes:
        path: where it is.
        user_id: the user_id that its CSV gives it; None without one.
        person: the same text for all photos of one person; None if nothing says which photos show the same person.
    """

    path: Path
    user_id: str | None
    person: str | None = None


def is_photo_name(path: Path, folder: Path) -> bool:
    """Whether a file below `folder` is meant as a photo: by its suffix, and neither hidden nor in a system folder."""
    parts = path.relative_to(folder).parts
    hidden = any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def find_photos(source: Path, *, person_folders: bool | None = False) -> list[Photo]:
    """Find the photos of a folder and its sub-folders, or those of a CSV.

    A CSV has the extension .csv and a first line with the names of its columns: `path`, relative to the CSV's folder,
    and optionally `user_id` and `person`. Other columns are ignored.

    Args:
        source: the folder, or the CSV.
        person_folders: whether each sub-folder holds the photos of one person. None: if every photo lies in one of two
            or more sub-folders, none deeper, and one of them holds several.

    Raises:
        ValueError: there is no photo, a path is there twice, or the list is not such a CSV.
        OSError: the folder or the file cannot be read.
    """
    found = _in_folder(source) if source.is_dir() else list(_in_csv(source))
    if source.is_dir() and person_folders is not False:
        found = _by_person(found, source, only_if_clear=person_folders is None)
    if not found:
        raise ValueError(f"there is no photo in {source} ({', '.join(SUFFIXES)})")
    if len({photo.path for photo in found}) < len(found):
        raise ValueError(f"{source} names a photo twice")
    return found


def _in_folder(folder: Path) -> list[Photo]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    photos = [Photo(path, None) for path in files if is_photo_name(path, folder)]
    if len(photos) < len(files):
        logger.info("%d files are skipped: they have no photo's suffix, or are hidden", len(files) - len(photos))
    return photos


def _by_person(photos: list[Photo], folder: Path, *, only_if_clear: bool) -> list[Photo]:
    """Give the photos of each sub-folder of `folder` the sub-folder's name as their person."""
    parts = [photo.path.relative_to(folder).parts for photo in photos]
    people = Counter(names[0] for names in parts if len(names) > 1)
    is_clear = all(len(names) == 2 for names in parts) and len(people) > 1 and max(people.values()) > 1
    if only_if_clear and not is_clear:
        if people:
            elsewhere = sum(len(names) != 2 for names in parts)
            logger.info(
                "Each photo is a person of its own: %d of %d photos lie in %d sub-folders, %d lie elsewhere. If each "
                "sub-folder holds the photos of one person, give --person-folders",
                len(parts) - elsewhere,
                len(parts),
                len(people),
                elsewhere,
            )
        return photos
    logger.info("%d sub-folders with the photos of one person each (else give --no-person-folders)", len(people))
    return [
        replace(photo, person=names[0] if len(names) > 1 else None) for photo, names in zip(photos, parts, strict=True)
    ]


def _in_csv(file: Path) -> Iterator[Photo]:
    if file.suffix.lower() != ".csv":
        raise ValueError(f"{file} is neither a folder nor a .csv file. In a CSV {LIST_COLUMNS}")
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.reader(lines, strict=True)
            columns = [name.strip().lower() for name in next(rows, [])]
            path_at, user_id_at = _column(columns, PATH_COLUMNS), _column(columns, USER_ID_COLUMNS)
            person_at = _column(columns, PERSON_COLUMNS)
            if path_at is None:
                raise ValueError(f"{file} cannot be used as a list of photos: {LIST_COLUMNS}")
            for row in rows:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(columns) or not row[path_at].strip():
                    raise ValueError(f"{file}, line {rows.line_num}: it must have a path and {len(columns)} columns")
                user_id = row[user_id_at].strip() if user_id_at is not None else ""
                person = row[person_at].strip() if person_at is not None else ""
                yield Photo(file.parent / row[path_at].strip(), user_id or None, person or None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a CSV in UTF-8: {error}") from error


def _column(columns: list[str], names: tuple[str, ...]) -> int | None:
    return next((at for at, name in enumerate(columns) if name in names), None)
