"""Starts the service or one of the operator's commands, and makes the Flask application."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import ExitStack

try:
    from flask import Flask
    from werkzeug.middleware.proxy_fix import ProxyFix

    # OpenBLAS, in NumPy, has its threads spin at first, and after each use: a tenth of a start's CPU time.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    import bootstrap
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"The Python package {missing.name!r} is missing: {sys.executable} is not the environment of this project. "
        "Use `make run`, or after it `.venv/bin/python app.py`."
    ) from missing

from api import description_pages, web_server
from api.html_pages import add_try_page
from api.metrics import Metrics
from api.multipart import FormRequest
from api.request_fields import FORM_ALLOWANCE_BYTES, refuse_fields_in_urls
from api.request_log import audit_requests, log_requests
from api.responses import answer_errors, protect_responses
from api.routes import add_routes
from api.service_parts import Parts
from commands import cli
from settings import Settings, add_flags
from version import VERSION

logger = logging.getLogger(__name__)


def create_app(settings: Settings, parts: Parts) -> Flask:
    """Make the WSGI application.

    Args:
        settings: the operator's settings.
        parts: what the routes work with: a warmed engine, a prepared store, a gallery that may still be loading.
    """
    app = Flask("face_api", static_folder=None)
    app.request_class = FormRequest
    app.json.ensure_ascii = False  # type: ignore[attr-defined]  # curl shows Arabic as Arabic
    app.url_map.merge_slashes = False  # a redirect would be an HTML page, and this API answers only JSON
    app.config["MAX_CONTENT_LENGTH"] = settings.max_file_bytes + FORM_ALLOWANCE_BYTES
    # The parser reads 64 KiB at a time, also of files, and counts them with what it held back before.
    app.config["MAX_FORM_MEMORY_SIZE"] = 2 * FORM_ALLOWANCE_BYTES
    app.config["MAX_FORM_PARTS"] = 32
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    audit = parts.audit
    metrics = Metrics(
        parts.engine.name, parts.pipeline.slots.queue, parts.gallery.status, lambda: audit.lost if audit else 0
    )
    app.extensions["metrics"] = metrics  # for the web server, which refuses some requests by itself
    log_requests(app, metrics)
    answer_errors(app, settings.max_file_bytes)
    protect_responses(app)
    if audit is not None:
        audit_requests(app, audit)
    parts.access.guard(app)
    refuse_fields_in_urls(app)
    add_routes(app, settings, parts, metrics)
    if settings.try_page == "on":
        add_try_page(app, settings)
    description_pages.add_description_routes(app, settings)  # last, because it describes all other routes
    return app


def serve(settings: Settings) -> int:
    """Run the service until it gets a signal to stop; returns the exit status."""
    # Set first: the first process of a container ignores SIGTERM unless it handles it, and a process that a script
    # started in the background ignores Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as at_the_end, bootstrap.explaining_missing_threads():
        parts = bootstrap.build_parts(settings, at_the_end)
        app = create_app(settings, parts)
        if settings.debug:
            logger.info("Ready, for development alone: http://%s:%d", settings.host, settings.port)
            app.run(settings.host, settings.port, debug=True, use_debugger=False, use_reloader=False, threaded=True)
        else:
            web_server.serve(app, settings, parts.gallery.refresh, app.extensions["metrics"])
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the service, or one of the operator's commands; returns the exit status."""
    bootstrap.forbid_core_dumps()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in cli.COMMANDS:
        return cli.run(arguments[0], arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        sys.stderr.write(f"There is no command {arguments[0]!r}.\n{cli.overview()}\n")
        return 2
    parser = argparse.ArgumentParser(
        prog="app.py",
        allow_abbrev=False,
        usage="python app.py [--flag VALUE ...]\n       python app.py COMMAND --help",
        description="Serves the face recognition API, or runs a command.\n\n"
        f"{cli.overview()}\n\n"
        "Each flag is also an environment variable and a line of .env: --log-level is\n"
        "LOG_LEVEL. .env.example explains each. Defaults are in brackets.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=27),
    )
    parser.add_argument("--version", action="version", version=VERSION)
    add_flags(parser)
    return cli.start(vars(parser.parse_args(arguments)), serve)


if __name__ == "__main__":
    raise SystemExit(main())
