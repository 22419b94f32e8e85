"""Owns the languages of messages and hints: English in the code, every other in a file of translations/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from face_checks import HINTS, NEARER_HINTS

SOURCE = "en"
KEY_OF_HINT = {hint: key for key, hint in {**HINTS, **NEARER_HINTS}.items()}


class Translations:
    """What the service says, in the languages that `folder` holds: `<language>.json` with `messages` and `hints`.

    Raises:
        OSError, ValueError: a file cannot be read.
    """

    def __init__(self, folder: Path = Path(__file__).parent / "languages") -> None:
        self._texts: dict[str, dict[str, dict[str, str]]] = {
            path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
        }

    def preferred(self, accepted: Iterable[tuple[str, float]]) -> str:
        """The language that a client likes best, of those that there are; English if there is none of them.

        Args:
            accepted: tags such as `ar-EG` and their qualities, the best first; of equals, the one that was sent first.
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
        """Return an answer's JSON, which is in English, with its message and its hints in `language`.

        Args:
            body: the answer.
            language: what `preferred` answered; what its file does not have stays English.
            sentence, values: what the message is made of, as in `errors.english`.
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
