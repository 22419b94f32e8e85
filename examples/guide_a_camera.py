"""Says what is wrong with a photo, as a capture screen would before it signs the person up."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import requests

FACE_API = os.environ.get("FACE_API", "http://127.0.0.1:5000")
HEADERS = {"Authorization": f"Bearer {os.environ.get('API_KEY', 'none')}", "Accept-Language": "en"}

photo = Path(sys.argv[1]).read_bytes()
answer = requests.post(f"{FACE_API}/analyze", files={"file": photo}, headers=HEADERS, timeout=60).json()
if answer["status"] == "error":  # the file is no photo that the service reads
    sys.exit(answer["message"])
for check in answer["checks"]:
    sign = "ok  " if check["passed"] else "NOT "
    print(sign, check["code"], check["measured"], check["required"], check["hint"] or "")
print(answer["message"])
sys.exit(0 if answer["accepted"] else 1)
