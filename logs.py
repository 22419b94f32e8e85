"""Formats log lines, as text for people or JSON for machines, and keeps photos and secrets out of them."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

# A caller adds fields with `extra={FIELDS: {...}}`: keys in the JSON object, key=value in the text.
FIELDS = "fields"


class TextFormatter(logging.Formatter):
    """One line for people: time, level, message, then key=value."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = getattr(record, FIELDS, {})
        return line + "".join(f" {key}={_plain(value)}" for key, value in fields.items())

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the library's name
        # Only the service's own messages have several lines. The indent keeps them from looking like log lines.
        return "\n  ".join(_one_line(line) for line in super().formatMessage(record).split("\n"))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{_plain(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else _one_line(str(value))


def _one_line(text: str) -> str:
    """The text with line breaks and terminal control characters escaped."""
    return text if text.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def configure(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send the process's log to a stream in one of the two forms.

    Args:
        log_format: `text` or `json`.
        level: the least severe level that is logged.
        stream: standard error if omitted.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonFormatter() if log_format == "json" else TextFormatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in (
        "waitress",  # it logs the URL of a request
        "waitress.queue",
        "PIL",
        "werkzeug",
        "pymongo",
        "httpx",
        "httpx2",
        "httpcore2",
        "urllib3",
        "huggingface_hub",
    ):
        # Debug lines of a database driver can hold embeddings; those of the decoder can hold where a photo was taken.
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))
