"""Translates messages and hints. English is in the code; every other language is a file in languages/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from face_checks import HINTS, NEARER_HINTS

SOURCE = "en"
KEY_OF_HINT = {hint: key for key, hint in {**HINTS, **NEARER_HINTS}.items()}


class Translations:
    """The texts of the languages in `folder`: each `<language>.json` has `messages` and `hints`.

    Raises:
        OSError, ValueError: a file cannot be read.
    """

    def __init__(self, folder: Path = Path(__file__).parent / "languages") -> None:
        self._texts: dict[str, dict[str, dict[str, str]]] = {
            path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
        }

    def preferred(self, accepted: Iterable[tuple[str, float]]) -> str:
        """The language that the client prefers among those that exist; English if none of them does.

        Args:
            accepted: tags such as `ar-EG` with their qualities, the best first; equal ones in the order sent.
        """
        known = {language.lower(): language for language in (SOURCE, *self._texts)}
        for tag, quality in accepted:
            whole = tag.replace("_", "-").lower()
            for language in (whole, whole.partition("-")[0]):
                if quality > 0 and language in known:
                    return known[language]
        return SOURCE

    def translated(
        self, body: Mapping[str, Any], language: str, sentence: str, values: Mapping[str, object]
    ) -> dict[str, Any]:
        """Return an English answer's JSON with its message and hints in `language`.

        Args:
            body: the answer.
            language: the answer of `preferred`. A text that its file lacks stays English.
            sentence, values: the sentence behind the message, as in `errors.english`.
        """
        texts = self._texts.get(language)
        if texts is None:
            return dict(body)
        found = dict(body)
        if sentence in texts["messages"]:
            found["message"] = texts["messages"][sentence].format_map(values)
        if "checks" in found:
            found["checks"] = [
                {**check, "hint": texts["hints"].get(KEY_OF_HINT.get(check["hint"], ""), check["hint"])}
                for check in found["checks"]
            ]
        return found
