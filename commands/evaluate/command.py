"""The command evaluate: error rates and thresholds, measured on the operator's own photos."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import bootstrap
from commands.bulk.processing import one_thread_per_photo, open_pipeline
from commands.command import Command
from commands.evaluate.cache import Cache, cache_key, embed_all
from commands.evaluate.data import read_folder, read_pairs, read_subgroups
from commands.evaluate.evaluation import evaluation
from commands.evaluate.report_text import summary
from settings import Settings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser this command's arguments."""
    parser.add_argument("dir", type=Path, help="a folder with one folder of photos for each person")
    parser.add_argument("--pairs", type=Path, help="LFW's pairs.txt: evaluate the photos that it names, by its folds")
    parser.add_argument("--subgroups", type=Path, help="CSV with the columns identity and group: rates for each group")
    parser.add_argument(
        "--wanted-fmr", type=_rate, default=1e-4, help="recommend a threshold for this FMR (default: 1e-4)"
    )
    parser.add_argument("--wanted-fpir", type=_rate, default=1e-2, help="and one for this FPIR (default: 1e-2)")
    parser.add_argument("--gallery-size", type=_size, help="people enrolled for this FPIR (default: the people of DIR)")
    parser.add_argument(
        "--without-checks",
        action="store_true",
        help="ignore the checks, and take the widest face: this measures the model alone",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for report.html and report.json (default: evaluation in DATA_DIR)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder that keeps the templates, so that an interrupted run continues when it is repeated. They are "
        "biometric data: delete the folder afterwards. TEMPLATE_KEYS encrypt it. Without --cache no template is "
        "written to disk",
    )


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return value


def _size(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Evaluate, write the report, and write its most important results to standard output.

    Raises:
        ValueError: the folder, the pairs or the subgroups cannot be used.
        OSError: a photo cannot be read, or the report cannot be written.
        ModelUnavailable: the model cannot be loaded.
    """
    # Matplotlib warns where its cache folder is read-only, as in the container. That only costs a second.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from commands.evaluate.report_page import page  # noqa: PLC0415 - only this command pays for matplotlib

    people, ignored = read_folder(arguments.dir)
    folds = read_pairs(arguments.pairs, people) if arguments.pairs else []
    if folds:
        named = {photo for fold in folds for pair in fold for photo in pair.photos}
        people = {name: [one for one in photos if one in named] for name, photos in people.items()}
        people = {name: photos for name, photos in people.items() if photos}
    groups = read_subgroups(arguments.subgroups, people) if arguments.subgroups else {}
    out = arguments.out or settings.data_dir / "evaluation"
    out.mkdir(mode=0o700, parents=True, exist_ok=True)  # before the work: an error here must not cost an hour
    logger.info("The report will be %s", out / "report.html")

    settings = one_thread_per_photo(settings)
    engine = bootstrap.engine_of(settings)
    paths = [one for photos in people.values() for one in photos]
    key = cache_key(engine, settings, arguments.without_checks)
    cache = Cache(arguments.cache, key, engine.dimension, settings.keyring)
    with open_pipeline(engine, settings) as pipeline:
        embed = pipeline.unchecked_template if arguments.without_checks else pipeline.template
        outcomes = embed_all(paths, embed, cache, at_once=settings.model_slots)
    logger.info("Comparing")
    result = evaluation(people, outcomes, engine, settings, arguments, folds=folds, groups=groups)
    result["photos"]["ignored_files"] = ignored
    (out / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page(result), encoding="utf-8")
    sys.stdout.write(summary(result))
    sys.stdout.write(f"\n{out / 'report.html'}, {out / 'report.json'}\n")
    return 0


EVALUATE = Command("evaluate", "measure error rates and thresholds on your own photos", run, add_arguments)
