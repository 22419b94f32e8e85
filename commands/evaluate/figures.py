"""The figures of an evaluation: the scores, the errors against the threshold, and DET curves."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from commands.evaluate.biometrics import ENOUGH_ERRORS
from commands.evaluate.report_text import Result, wanted_text

# Two colours that colour-blind readers can tell apart (Okabe and Ito 2008).
GENUINE: dict[str, Any] = {"color": "#0072b2"}
IMPOSTOR: dict[str, Any] = {"color": "#d55e00"}
THRESHOLD_STYLES = ("-", "--", ":", "-.")


def draw_figures(result: Result) -> list[tuple[str, bytes]]:
    """Draw what the evaluation can show: title and SVG of each figure."""
    pairs, searches = result["comparisons"], result["searches"]
    figures = [
        ("Similarities of genuine and impostor pairs", _scores(result)),
        ("Both errors against the threshold", _errors(result)),
    ]
    curves = result["curves"]
    if pairs["genuine_pairs"]:
        det = _det(
            ("FMR", curves["fmr"], pairs["impostor_pairs"]), ("FNMR", curves["fnmr"], pairs["genuine_pairs"]),
            f"{ENOUGH_ERRORS} false matches",
        )  # fmt: skip
        figures.append(("DET curve, 1:1", det))
    if searches["mated"]:
        gallery = searches["gallery"]
        det = _det(
            (f"FPIR, {gallery - 1:,} enrolled", curves["fpir"], searches["strangers"]),
            (f"FNIR, {gallery:,} enrolled", curves["fnir"], searches["mated"]),
            f"{ENOUGH_ERRORS} false positives",
        )
        figures.append(("DET curve, 1:N", det))
    return figures


def _scores(result: Result) -> bytes:
    curves = result["curves"]
    figure, axes = _new("similarity", "share of the pairs, per 0.01")
    low = _lowest(curves)
    for name, style in (("genuine", GENUINE), ("impostor", IMPOSTOR)):
        share = np.array(curves[name]) / max(1, sum(curves[name]))
        axes.stairs(share, [*curves["bins"], curves["bins"][-1] + 0.01], fill=True, alpha=0.3, **style)
        axes.stairs(share, [*curves["bins"], curves["bins"][-1] + 0.01], label=name, **style)
    axes.set(xlim=(low, 1), ylim=(0, None))
    _mark_thresholds(axes, result)
    return _svg(figure, axes)


def _errors(result: Result) -> bytes:
    curves, pairs = result["curves"], result["comparisons"]
    figure, axes = _new("threshold", "FMR, FNMR")
    for name, style in (("fnmr", GENUINE), ("fmr", IMPOSTOR)):
        if name == "fmr" or pairs["genuine_pairs"]:
            axes.plot(curves["thresholds"], curves[name], label=name.upper(), **style)
    most_trials = max(pairs["impostor_pairs"], pairs["genuine_pairs"])
    axes.set_yscale("log", nonpositive="mask")  # the line ends where no error was seen
    axes.set(xlim=(_lowest(curves), 1), ylim=(_decade_below(most_trials), 1))
    _mark_thresholds(axes, result)
    return _svg(figure, axes)


def _det(x: tuple[str, Sequence[float], int], y: tuple[str, Sequence[float], int], few: str) -> bytes:
    """A DET curve; each axis is its label, its rate at every threshold, and the number of trials."""
    figure, axes = _new(x[0], y[0])
    axes.plot(x[1], y[1], **GENUINE)
    axes.set_xscale("log", nonpositive="mask")
    axes.set_yscale("log", nonpositive="mask")
    axes.set(xlim=(_decade_below(x[2]), 1), ylim=(_decade_below(y[2]), 1))
    axes.axvline(ENOUGH_ERRORS / max(1, x[2]), color="black", linestyle=":", label=f"{few}: fewer to the left")
    return _svg(figure, axes)


def _new(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    return figure, axes


def _mark_thresholds(axes: Axes, result: Result) -> None:
    """Draw the present threshold and the recommended ones as upright lines; the legend says which is which."""
    present = result["at_verify_threshold"]["threshold"]
    marks = {present: f"VERIFY_THRESHOLD: {present:g}"}
    for one in result["recommended"]:
        threshold = one["threshold"]
        if threshold is not None:
            text = f"for {one['for'].upper()} {wanted_text(one['wanted'])}"
            marks[threshold] = f"{marks[threshold]}, {text}" if threshold in marks else f"{text}: {threshold:g}"
    for (threshold, text), style in zip(marks.items(), THRESHOLD_STYLES, strict=False):
        axes.axvline(threshold, color="black", linewidth=1.2, linestyle=style, label=text)


def _svg(figure: Figure, axes: Axes) -> bytes:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "face-api"}):  # the same data give the same file
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _decade_below(trials: int) -> float:
    """The power of ten at or below one in so many trials, at most 0.1."""
    return float(10.0 ** min(-1, math.floor(-math.log10(max(1, trials)) + 1e-9)))


def _lowest(curves: Result) -> float:
    """Where the scores begin, in steps of 0.1: -1 at the lowest."""
    filled = [
        low for low, *counts in zip(curves["bins"], curves["genuine"], curves["impostor"], strict=True) if any(counts)
    ]
    return math.floor(10 * min(filled, default=0.0)) / 10
