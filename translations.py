"""Owns the languages of messages and hints: English in the code, every other in a file of translations/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from settings import PROJECT

SOURCE = "en"


class Translations:
    """What the service says, in the languages that `folder` holds: `<language>.json` with `messages` and `hints`.

    Raises:
        OSError, ValueError: a file cannot be read.
    """

    def __init__(self, folder: Path = PROJECT / "translations") -> None:
        self._texts: dict[str, dict[str, dict[str, str]]] = {
            path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
        }

    @property
    def languages(self) -> list[str]:
        """Every language, the source first."""
        return [SOURCE, *self._texts]

    def translated(self, body: Mapping[str, Any], language: str) -> dict[str, Any]:
        """Return an answer's JSON with its message, when it has a code, and its hints in another language.

        What numbers a message carries in English stand in `checks`, or in the API's description.
        """
        texts = self._texts.get(language)
        if texts is None:
            return dict(body)
        found = dict(body)
        if found.get("code") in texts["messages"]:
            found["message"] = texts["messages"][found["code"]]
        if "checks" in found:
            found["checks"] = [
                {**check, "hint": texts["hints"].get(check["code"], check["hint"])} if check["hint"] else check
                for check in found["checks"]
            ]
        return found
