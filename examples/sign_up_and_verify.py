"""Signs a person up with one photo, and recognises the person in a second one."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

import requests

FACE_API = os.environ.get("FACE_API", "http://127.0.0.1:5000")
HEADERS = {"Authorization": f"Bearer {os.environ.get('API_KEY', 'none')}"}

first, second = (Path(name).read_bytes() for name in sys.argv[1:3])

# With the same Idempotency-Key the sign-up can be sent again after a lost answer: it answers what it answered before.
answer = requests.post(
    f"{FACE_API}/signUp",
    files={"file": first},
    headers={**HEADERS, "Idempotency-Key": str(uuid.uuid4())},
    timeout=60,
).json()
print(answer["message"])
for check in answer.get("checks", []):
    if not check["passed"]:
        print("-", check["hint"])

answer = requests.post(f"{FACE_API}/verify", files={"file": second}, headers=HEADERS, timeout=60).json()
print(answer["message"])
sys.exit(0 if answer.get("verified") else 1)
