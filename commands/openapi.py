"""The command openapi: writes the API's description, for tools or for people."""

from __future__ import annotations

import argparse
import json
import sys

from api import openapi
from api.description_pages import render
from settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python app.py openapi`."""
    parser.add_argument("--markdown", action="store_true", help="as docs/api.md instead")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Write the API's description, as OpenAPI 3.1 in JSON or as Markdown; returns the exit status."""
    api = openapi.describe(settings)
    sys.stdout.write(render("api.md", api) if arguments.markdown else json.dumps(api, indent=2) + "\n")
    return 0
