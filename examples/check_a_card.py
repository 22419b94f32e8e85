"""Compares a selfie with the portrait on an identity card; nothing is stored."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import requests

FACE_API = os.environ.get("FACE_API", "http://127.0.0.1:5000")
HEADERS = {"Authorization": f"Bearer {os.environ.get('API_KEY', 'none')}"}

selfie, card = (Path(name).read_bytes() for name in sys.argv[1:3])
answer = requests.post(
    f"{FACE_API}/compare", files={"file1": selfie, "file2": card}, headers=HEADERS, timeout=60
).json()
if answer["status"] == "error":
    sys.exit(f"{answer.get('field', '')}: {answer['message']}")
print(f"{answer['message']} Similarity {answer['similarity']:.2f}, threshold {answer['threshold']:.2f}.")
sys.exit(0 if answer["match"] else 1)
