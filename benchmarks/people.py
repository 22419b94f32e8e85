"""Counts who signs up and who is recognised, over HTTP, from a folder of identities.

    python benchmarks/people.py URL DIR [--turned]

DIR holds a sub-folder of photos per person. The first photo of each signs up and the others verify, against the
running service at URL, whose gallery should be empty and is not emptied afterwards. With --turned, those that verify
are sent to /signUp, too, by one, two and three quarters of a turn: each should be a duplicate.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np


def post(url: str, photo: bytes) -> dict[str, Any]:
    """Post one photo as form-data and return the JSON answer, whatever its status."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="photo"\r\n\r\n'
    body = head.encode() + photo + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    asked = urllib.request.Request(url, body, headers)  # noqa: S310 - the operator's own address
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310
            return dict(json.load(answer))
    except urllib.error.HTTPError as refusal:
        return dict(json.load(refusal))


def turned(photo: bytes, quarters: int) -> bytes:
    """A photo after so many counter-clockwise quarter turns, without loss."""
    pixels = np.asarray(cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR), np.uint8)
    return cv2.imencode(".png", np.rot90(pixels, quarters))[1].tobytes()


def main(url: str, folder: Path, *, turns: bool) -> None:
    """Print how many people signed up, and how their other photos fared."""
    people = {one: sorted(one.glob("*.jpg")) for one in sorted(folder.iterdir()) if one.is_dir()}
    signed_up: Counter[str] = Counter()
    verified: Counter[str] = Counter()
    duplicates: Counter[str] = Counter()
    user_ids: dict[Path, str | None] = {}
    for person, photos in people.items():
        answer = post(f"{url}/signUp", photos[0].read_bytes())
        user_ids[person] = answer.get("user_id")
        signed_up[answer.get("code", "signed up")] += 1
    for person, photos in people.items():
        for photo in photos[1:]:
            answer = post(f"{url}/verify", photo.read_bytes())
            right = answer.get("user_id") == user_ids[person]
            verified[answer.get("code") or ("as themselves" if right else "AS SOMEBODY ELSE")] += 1
            for quarters in (1, 2, 3) if turns and right else ():
                answer = post(f"{url}/signUp", turned(photo.read_bytes(), quarters))
                duplicates[answer.get("code", "SIGNED UP AGAIN")] += 1
    for what, counts in (("first photos", signed_up), ("other photos", verified), ("turned ones", duplicates)):
        print(f"{what}: {dict(counts.most_common())}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["--turned"]):
        raise SystemExit(__doc__)
    main(sys.argv[1].rstrip("/"), Path(sys.argv[2]), turns=len(sys.argv) == 4)
