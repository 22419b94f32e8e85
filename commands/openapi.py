"""The command openapi: writes the API's description, for tools or for people."""

from __future__ import annotations

import argparse
import json
import sys

from api import openapi
from api.description_pages import render_page
from commands.command import Command
from settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("--markdown", action="store_true", help="write docs/api.md instead")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Write the API's description to standard output, as OpenAPI 3.1 in JSON or as Markdown."""
    api = openapi.describe(settings)
    sys.stdout.write(render_page("api.md", api) if arguments.markdown else json.dumps(api, indent=2) + "\n")
    return 0


OPENAPI = Command("openapi", "write the API's description: OpenAPI 3.1, or --markdown", run, add_arguments)
