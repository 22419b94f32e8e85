"""Reads what an evaluation works on: folders of people's photos, LFW's pairs, and subgroups."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.bulk.photo_list import is_photo_name


@dataclass(frozen=True)
class Pair:
    """Two photos of LFW's protocol, and whether they show one person."""

    photos: tuple[Path, Path]
    same: bool


def read_folder(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """The photos of each person, in the order of their names, and how many other files were ignored.

    Ignored are files that are no photos, hidden files, and photos that do not lie directly in a person's folder.

    Raises:
        ValueError: fewer than two people.
        OSError: no such folder.
    """
    people: dict[str, list[Path]] = {}
    ignored = sum(one.is_file() and is_photo_name(one, folder) for one in folder.iterdir())
    for person in sorted(one for one in folder.iterdir() if one.is_dir()):
        files = [Path(root, name) for root, _, names in os.walk(person) for name in names]
        photos = sorted(one for one in files if one.parent == person and is_photo_name(one, folder))
        ignored += len(files) - len(photos)
        if photos:
            people[person.name] = photos
    if len(people) < 2:
        raise ValueError(f"{folder} must hold a folder of photos for each of two or more people")
    return people, ignored


def read_pairs(file: Path, people: Mapping[str, Sequence[Path]]) -> list[list[Pair]]:
    """Read pairs in LFW's format: `folds pairs` first, then for each fold so many `name n n` and `name n name n`.

    Raises:
        ValueError: the file is not of that form, or names a photo (`name/name_000n.*`) that is not there.
    """
    there = {(name, photo.stem): photo for name, photos in people.items() for photo in photos}
    head, *lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()] or [[]]
    folds, each = (int(one) for one in head) if len(head) == 2 and all(map(str.isdigit, head)) else (0, 0)
    if folds < 2 or each < 1 or len(lines) != 2 * folds * each:
        raise ValueError(
            f"{file} is no list of pairs in LFW's format: its first line gives folds (2 or more) and pairs, and twice "
            f"folds x pairs lines follow; it gives {' '.join(head) or 'nothing'}, and {len(lines)} lines follow"
        )
    pairs = []
    for words in lines:
        same = len(words) == 3
        ends = [(words[0], words[1]), (words[0] if same else words[-2], words[-1])] if len(words) in (3, 4) else []
        photos = [there.get((name, f"{name}_{number:0>4}")) for name, number in ends]
        if not photos or photos[0] is None or photos[1] is None:
            raise ValueError(f"{file} names a pair that is not there: {' '.join(words)}")
        pairs.append(Pair((photos[0], photos[1]), same))
    return [pairs[start : start + 2 * each] for start in range(0, len(pairs), 2 * each)]


def read_subgroups(file: Path, people: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Read which group each person belongs to. A person who is not named belongs to none.

    Raises:
        ValueError: a column is missing, one person is in two groups, or nobody of the file has photos.
    """
    groups: dict[str, str] = {}
    with file.open(encoding="utf-8-sig", newline="") as rows:
        for row in csv.DictReader(rows):
            identity, group = ((row.get(column) or "").strip() for column in ("identity", "group"))
            if not identity or not group:
                raise ValueError(f"{file} needs the columns identity and group, both filled in every row")
            if groups.setdefault(identity, group) != group:
                raise ValueError(f"{file} puts {identity} into two groups")
    groups = {identity: group for identity, group in groups.items() if identity in people}
    if not groups:
        raise ValueError(f"{file} names nobody who has photos here")
    return groups
