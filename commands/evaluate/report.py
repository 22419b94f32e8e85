"""Owns how an evaluation is told: the summary in plain text, and the HTML page with its figures."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from commands.evaluate.biometrics import ENOUGH_ERRORS

Result = Mapping[str, Any]
Format = Callable[[float], str]

# --- Numbers: never "0" for what was only not seen, never "100 %" for less ------------------------------------------


def per_cent(share: float) -> str:
    """A share with two or three digits that count: `12.3 %`, `0.098 %`, `> 99.9 %`."""
    value = 100 * share
    if 99.9 < value < 100:
        return "> 99.9 %"
    digits = 1 if value >= 10 else 2
    text = f"{value:.{digits}f}" if value >= 1 else np.format_float_positional(value, 2, fractional=False, trim="-")
    return f"{text} %"


def power_of_ten(share: float) -> str:
    """A small share as `1.0·10⁻⁴`; from 0.1 on in per cent."""
    if share == 0 or share >= 0.1:
        return per_cent(share)
    mantissa, exponent = f"{share:.1e}".split("e")
    return f"{mantissa}·{_ten_to(int(exponent))}"


def _ten_to(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def rate_text(rate: Result, form: Format = per_cent) -> str:
    """A rate with its interval, or in how many trials nothing was seen."""
    errors, trials = rate["errors"], rate["trials"]
    if not trials:
        return "not measurable: nothing to count"
    if not errors:
        return f"none of {trials:,} (at most {form(rate['high'])})"
    if errors == trials:
        return f"all of {trials:,} (at least {form(rate['low'])})"
    return _with_interval(rate, form)


def _with_interval(rate: Result, form: Format = per_cent) -> str:
    return f"{form(rate['share'])} ({form(rate['low'])} to {form(rate['high'])})".replace(" % to ", " to ")


def _wanted(share: float) -> str:
    exponent = math.log10(share)
    return _ten_to(round(exponent)) if abs(exponent - round(exponent)) < 1e-9 else power_of_ten(share)


# --- What both forms say ---------------------------------------------------------------------------------------------


def _introduction(result: Result) -> str:
    made, photos, pairs = result["made"], result["photos"], result["comparisons"]
    checks = "" if made["checks"] else ", whatever the checks would have said (the widest face of each photo)"
    return (
        f"{photos['photos']:,} photos of {photos['people']:,} people ({made['folder']}), model "
        f"{made['model']}{checks}: {photos['templates']:,} templates of {photos['people_with_templates']:,} people, "
        f"{pairs['genuine_pairs']:,} genuine pairs (two photos of one person, from "
        f"{pairs['people_with_genuine_pairs']:,} people) and {pairs['impostor_pairs']:,} impostor pairs."
    )


def _cautions(result: Result) -> list[str]:
    photos, made = result["photos"], result["made"]
    said = []
    if photos["files_of_two_people"]:
        said.append(
            f"{photos['files_of_two_people']:,} files lie in the folders of two people. One of the two is wrong, and "
            "each counts as false matches: mend that first."
        )
    if photos["repeated_files"]:
        said.append(f"{photos['repeated_files']:,} files were there twice in one folder and counted once.")
    if photos["ignored_files"]:
        said.append(
            f"{photos['ignored_files']:,} files were passed over: they have no name of a photo, or lie in no person's "
            "own folder."
        )
    if photos["people_with_templates"] < 100:
        said.append(
            f"{photos['people_with_templates']} people are few: all rates rest on them, and the intervals show it."
        )
    if made["changed_limits"]:
        changed = ", ".join(f"{name}={value:g}" for name, value in made["changed_limits"].items())
        said.append(f"Limits other than the defaults: {changed}.")
    if not result["comparisons"]["genuine_pairs"]:
        said.append("Nobody has two photos, so that nothing is known of misses (FNMR, FNIR).")
    said.append(
        "The rates hold for photos like these. Other cameras, ages, groups of people, relatives and twins have others, "
        "and nothing here tests attacks (a photo of a photo, a mask made for it)."
    )
    said.append(
        "A recommended threshold was chosen on these very photos, which flatters it a little: check it on others."
    )
    return said


def _recommendation(one: Result, result: Result) -> str:
    """One recommended threshold with what it costs, or why there is none."""
    if one["for"] == "fmr":
        goal, trials = f"FMR {_wanted(one['wanted'])}", f"{result['comparisons']['impostor_pairs']:,} impostor pairs"
    else:
        goal = f"FPIR {_wanted(one['wanted'])} with {one['gallery_size']:,} enrolled"
        trials = f"{result['searches']['strangers']:,} searches"
        if one["extrapolated"]:
            goal += f" (extrapolated: that takes FMR {power_of_ten(one['fmr_needed'])})"
            trials = f"{result['comparisons']['impostor_pairs']:,} impostor pairs"
    if one["support"] == "not measurable":
        people = math.ceil((1 + math.sqrt(1 + 8 * one["trials_needed"])) / 2)
        such = "" if trials.endswith("searches") else f", such as one photo each of {people:,} people"
        return f"{goal}: not measurable with {trials}; it takes {one['trials_needed']:,}{such}."
    if one["threshold"] is None:
        return f"{goal}: no threshold keeps it here, for too many scores of different people are 1 (the same files?)."
    doubt = "" if one["support"] == "measured" else f" Uncertain: fewer than {ENOUGH_ERRORS} errors decide it."
    return (
        f"{goal}: {one['line']} — FMR {rate_text(one['fmr'], power_of_ten)}, FNMR {rate_text(one['fnmr'])}, "
        f"FPIR {rate_text(one['fpir'])}, FNIR {rate_text(one['fnir'])}.{doubt}"
    )


def _comparison_rows(result: Result) -> list[list[str]]:
    """wanted FMR, threshold, FMR, FNMR, FRR; a row that cannot be measured says so."""
    pairs = result["comparisons"]
    rows = []
    for row in pairs["rows"]:
        if row["threshold"] is None:
            why = f"not measurable with {pairs['impostor_pairs']:,} pairs"
            if row["support"] != "not measurable":
                why = "no threshold keeps it: too many scores are 1"
            rows.append([_wanted(row["wanted_fmr"]), why, "-", "-", "-"])
            continue
        doubt = "" if row["support"] == "measured" else " (uncertain)"
        rows.append([_wanted(row["wanted_fmr"]) + doubt, *_at(row)])
    rows.append(["(as set)", *_at(result["at_verify_threshold"])])
    return rows


def _at(row: Result) -> list[str]:
    attempt = per_cent(row["frr"]) if "frr" in row else "-"
    if attempt == "0 %":
        attempt = "none seen"
    return [f"{row['threshold']:.4f}", rate_text(row["fmr"], power_of_ten), rate_text(row["fnmr"]), attempt]


def _search_rows(result: Result) -> list[list[str]]:
    rows = []
    for row in (*result["comparisons"]["rows"], result["at_verify_threshold"]):
        if row["threshold"] is not None:
            beyond = [_extrapolation(row["fmr"], one) for one in row["extrapolated_fpir"].values()]
            rows.append([f"{row['threshold']:.4f}", rate_text(row["fpir"]), rate_text(row["fnir"]), *beyond])
    return rows


def _extrapolation(fmr: Result, fpir: Result) -> str:
    """An extrapolated rate is never certain, however near to 1 it is."""
    if not fmr["errors"]:
        return "not known" if fpir["high"] > 0.999 else f"at most {per_cent(fpir['high'])}"
    return "> 99.9 %" if fpir["low"] > 0.999 else _with_interval({name: min(one, 0.9999) for name, one in fpir.items()})


def _protocol(result: Result) -> list[str]:
    one = result["protocol"]
    said = [
        f"{_accuracy(one['all'])} (mean and standard error of "
        f"{one['folds']} folds, {one['pairs']:,} pairs; each fold at the threshold that is best on the others: "
        f"{min(one['all']['thresholds']):.4f} to {max(one['all']['thresholds']):.4f})."
    ]
    if one["pairs_refused"] and one["compared"]:
        said.append(
            f"In {one['pairs_refused']:,} pairs a photo was refused, which counts as 'two different people'. Of the "
            f"others {_accuracy(one['compared'])} are right."
        )
    return said


def _accuracy(one: Result) -> str:
    return f"{100 * one['accuracy']:.2f} % ± {100 * one['standard_error']:.2f}"


_COMPARISON_HEAD = ("wanted FMR", "threshold", "FMR (95 %)", "FNMR (95 %)", "FRR of attempts")


def _search_head(result: Result) -> list[str]:
    sizes = result["at_verify_threshold"]["extrapolated_fpir"]
    return ["threshold", "FPIR (95 %)", "FNIR (95 %)", *(f"extrapolated FPIR, N = {int(one):,}" for one in sizes)]


def _failure_rows(result: Result) -> list[list[str]]:
    found = result["failures"]
    return [
        ["photos refused (FTA)", rate_text(found["fta"])],
        *([f"… {code}", f"{count:,}"] for code, count in found["by_code"].items()),
        ["people whose first photo was refused (FTE)", rate_text(found["fte"])],
        ["people none of whose photos passed", f"{found['people_without_template']:,}"],
    ]


_SUBGROUP_HEAD = ("group", "people", "photos refused", "threshold", "FMR within the group", "FNMR")


def _subgroup_rows(result: Result) -> list[list[str]]:
    rows = []
    for name, group in result["subgroups"]["groups"].items():
        head = [name, f"{group['people']:,}", rate_text(group["fta"])]
        for row in group["rows"]:
            small = min(row["fmr"]["errors"], row["fnmr"]["errors"]) < ENOUGH_ERRORS
            rates = [rate_text(row["fmr"], power_of_ten), rate_text(row["fnmr"])]
            rows.append([*head, f"{row['threshold']:.4f}" + (" *" if small else ""), *rates])
    return rows


_SUBGROUP_NOTE = (
    f"* fewer than {ENOUGH_ERRORS} errors of either kind: the interval says more than the rate. Groups differ only "
    "where intervals do; and with many groups some differ by chance."
)
_EXTRAPOLATED_NOTE = (
    "Extrapolated is 1 - (1 - FMR)^N, from the 1:1 rate: what N people would give if all comparisons were independent "
    "and equally likely to match falsely. They are not (relatives, poor photos that match many), so hold it against "
    "the measured FPIR before you believe it for other N."
)


def summary(result: Result) -> str:
    """The most important of it in plain text."""
    lines = [_introduction(result), "", *_text_table((), _failure_rows(result)), ""]
    lines += ["1:1, every photo against every other", *_text_table(_COMPARISON_HEAD, _comparison_rows(result)), ""]
    found = result["searches"]
    lines += [f"1:N, in a gallery of {found['gallery']:,} (one photo each; strangers: {found['gallery'] - 1:,})"]
    lines += [*_text_table(_search_head(result)[:3], [row[:3] for row in _search_rows(result)]), ""]
    if result["protocol"]:
        lines += ["LFW's protocol", *_protocol(result), ""]
    if result["subgroups"]:
        lines += ["By group", *_text_table(_SUBGROUP_HEAD, _subgroup_rows(result)), _SUBGROUP_NOTE, ""]
    lines += ["Recommended", *(_recommendation(one, result) for one in result["recommended"]), ""]
    lines += ["Mind", *(f"- {one}" for one in _cautions(result))]
    return "\n".join(lines) + "\n"


def _text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    shown = [*([head] if head else []), *rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)
    return [f"  {line.rstrip()}" for line in lines]


# --- Figures ---------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 440, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 430, 34, 272


@dataclass(frozen=True)
class Axis:
    """One axis of a figure: linear, or logarithmic from 10^low to 10^high."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0...1; beyond the ends is at the end."""
        if self.log:
            value = math.log10(value) if value > 0 else -math.inf
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self) -> list[tuple[float, str]]:
        if self.log:
            return [(10.0**one, _ten_to(one) if one else "1") for one in range(round(self.low), round(self.high) + 1)]
        step = next(one for one in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if (self.high - self.low) / one <= 8)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(one * step, f"{one * step:g}" if abs(one) > 0 else "0") for one in range(first, last + 1)]


@dataclass(frozen=True)
class Curve:
    """A line of a figure: its name, its look (`first`, `second`; `area`s are filled), and its points."""

    name: str
    look: str
    points: Sequence[tuple[float, float]]


def _figure(title: str, x: Axis, y: Axis, curves: Sequence[Curve], marks: Sequence[tuple[float, str]] = ()) -> str:
    """An SVG of curves; `marks` are upright lines at values of x, with a name."""

    def across(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * x.place(value), 1)

    def up(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * y.place(value), 1)

    parts = []
    for value, text in x.ticks():
        parts.append(f'<path class="grid" d="M{across(value)} {_TOP}V{_BOTTOM}"/>')
        parts.append(f'<text x="{across(value)}" y="{_BOTTOM + 17}" text-anchor="middle">{text}</text>')
    for value, text in y.ticks():
        parts.append(f'<path class="grid" d="M{_LEFT} {up(value)}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(value) + 4}" text-anchor="end">{text}</text>')
    for number, curve in enumerate(curves):
        line = "M" + "L".join(f"{across(a)} {up(b)}" for a, b in curve.points) if curve.points else ""
        parts.append(f'<path class="{curve.look}" d="{line}"/>')
        begin = _LEFT + 185 * number
        parts.append(f'<path class="{curve.look.split()[0]}" d="M{begin} 14h22"/>')
        parts.append(f'<text x="{begin + 27}" y="18">{html.escape(curve.name)}</text>')
    parts += [f'<path class="mark" d="M{across(value)} {_TOP}V{_BOTTOM}"/>' for value, _ in marks]
    for number, (value, text) in enumerate(marks):
        left = x.place(value) > 0.5
        parts.append(
            f'<text x="{across(value) + (-4 if left else 4)}" y="{_TOP + 12 + 14 * number}" '
            f'text-anchor="{"end" if left else "start"}">{html.escape(text)}</text>'
        )
    middle = (_TOP + _BOTTOM) / 2
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(x.label)}</text>'
    )
    parts.append(
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y.label)}</text>'
    )
    name = html.escape(title)
    return (
        f'<figure><figcaption>{name}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{name}">{"".join(parts)}</svg></figure>'
    )


def _decade_below(trials: int) -> int:
    """The exponent of the power of ten at or below one in so many."""
    return min(-1, math.floor(-math.log10(max(1, trials)) + 1e-9))


def _thinned(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points with both rates above 0, each once."""
    return list(dict.fromkeys(point for point in points if min(point) > 0))


def _figures(result: Result) -> list[str]:
    curves, pairs, found = result["curves"], result["comparisons"], result["searches"]
    thresholds = curves["thresholds"]
    present = result["at_verify_threshold"]["threshold"]
    marks = [(present, f"as set, {present:g}")]
    marks += [
        (one["threshold"], f"for {one['for'].upper()} {_wanted(one['wanted'])}, {one['threshold']:g}")
        for one in result["recommended"]
        if one["threshold"] is not None and one["threshold"] != present
    ]
    scores = Axis("similarity", _lowest(curves), 1.0)
    impostor = Axis("FMR", _decade_below(pairs["impostor_pairs"]), 0, log=True)
    genuine = Axis("FNMR", _decade_below(pairs["genuine_pairs"]), 0, log=True)
    both = Axis("FMR, FNMR", min(impostor.low, genuine.low), 0, log=True)
    shares = {name: np.array(curves[name]) / max(1, sum(curves[name])) for name in ("genuine", "impostor")}
    highest = Axis("share of the pairs, per 0.01", 0, max(float(one.max()) for one in shares.values()) or 1)

    def steps(share: Any) -> list[tuple[float, float]]:
        outline = [
            (float(a + side), float(b)) for a, b in zip(curves["bins"], share, strict=True) for side in (0, 0.01)
        ]
        return [(-1.0, 0.0), *outline, (1.0, 0.0)]

    uncertain = [(ENOUGH_ERRORS / max(1, pairs["impostor_pairs"]), f"{ENOUGH_ERRORS} false matches")]
    drawn = [
        _figure(
            "Similarities of genuine and impostor pairs",
            scores,
            highest,
            [
                Curve("genuine", "first area", steps(shares["genuine"])),
                Curve("impostor", "second area", steps(shares["impostor"])),
            ],
            marks,
        )
    ]
    # A rate of 0 has no place on a logarithmic axis: the lines end where nothing more was seen.
    lines = [
        Curve(name.upper(), look, [(a, b) for a, b in zip(thresholds, curves[name], strict=True) if b > 0])
        for name, look in (("fmr", "second"), ("fnmr", "first"))
        if name == "fmr" or pairs["genuine_pairs"]
    ]
    drawn.append(_figure("Both errors against the threshold", scores, both, lines, marks))
    if pairs["genuine_pairs"]:
        det = Curve("1:1", "first", _thinned(zip(curves["fmr"], curves["fnmr"], strict=True)))
        title = "DET curve, 1:1 (left of the line fewer than 30 false matches decide)"
        drawn.append(_figure(title, impostor, genuine, [det], uncertain))
    if found["mated"]:
        x = Axis(f"FPIR, {found['gallery'] - 1:,} enrolled", _decade_below(found["strangers"]), 0, log=True)
        y = Axis(f"FNIR, {found['gallery']:,} enrolled", _decade_below(found["mated"]), 0, log=True)
        open_set = Curve("1:N", "first", _thinned(zip(curves["fpir"], curves["fnir"], strict=True)))
        title = "DET curve, 1:N (left of the line fewer than 30 false positives decide)"
        few = [(ENOUGH_ERRORS / max(1, found["strangers"]), f"{ENOUGH_ERRORS} false positives")]
        drawn.append(_figure(title, x, y, [open_set], few))
    return drawn


def _lowest(curves: Result) -> float:
    """Where the scores begin, in steps of 0.1: -1 at the lowest."""
    filled = [
        low for low, *counts in zip(curves["bins"], curves["genuine"], curves["impostor"], strict=True) if any(counts)
    ]
    return math.floor(10 * min(filled, default=0.0)) / 10


# --- The page --------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #d9dee4; --first: #0a5fb4; --second: #b2490a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --paper: #15181c; --soft: #3a4048; --first: #74b6ff; --second: #ffab6b }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
pre { padding: .75rem; border: 1px solid var(--soft); border-radius: .4rem; white-space: pre-wrap }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .4rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600; font-size: .95rem }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: currentColor;
  stroke: var(--paper); stroke-width: 3px; paint-order: stroke }
path { fill: none; stroke-width: 2 } .grid { stroke: var(--soft); stroke-width: 1 }
.first { stroke: var(--first) } .second { stroke: var(--second); stroke-dasharray: 6 3 }
.area { fill-opacity: .25; stroke-width: 1.2; stroke-dasharray: none } .first.area { fill: var(--first) }
.second.area { fill: var(--second) } .mark { stroke: currentColor; stroke-width: 1; stroke-dasharray: 2 3 }
"""

_METHOD = f"""
<ul>
<li>Each photo went through the service's own pipeline. FMR and FNMR count all pairs of photos that passed ("all
pairs"); refused photos are the failures to acquire (FTA). <em>FRR of attempts</em> adds them as ISO/IEC 19795-1 does:
FTA + FNMR·(1 &minus; FTA). The JSON file also has FAR, and GFRR and GFAR, where enrolment (each person's first photo,
FTE) may fail as well.</li>
<li>A score at the threshold is a match, as in the service. A threshold is the lowest, to four decimals, at which no
larger share than the wanted one matches falsely.</li>
<li>Intervals are Wilson's 95 % at the effective number of trials. Pairs that share a person are not independent: the
variance sums what each person adds. Where no error was seen, each person (FNMR) or each two people (FMR) count as one
trial.</li>
<li>By the rule of 3 a rate is "not measurable" where fewer than 3 errors are expected, and by the rule of 30
"uncertain" below {ENOUGH_ERRORS}.</li>
<li>1:N: the gallery holds each person's first photo that passed. FNIR: the other photos, missed or taken for somebody
else. FPIR: all photos search as strangers, the person's own entry withheld.</li>
</ul>
"""


def page(result: Result) -> str:
    """The whole report as one HTML file, which loads nothing from anywhere."""
    title = f"Face recognition, evaluated on {result['made']['folder']}"
    found = result["searches"]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(_introduction(result))} Made {html.escape(result['made']['at'])}.</p>",
        "<h2>Recommended thresholds</h2>",
        *(f"<p>{html.escape(_recommendation(one, result))}</p>" for one in result["recommended"]),
        *_env(result),
        "<h2>Mind</h2>",
        "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in _cautions(result)) + "</ul>",
        "<h2>Comparing two photos (1:1)</h2>",
        _table("At thresholds for a wanted FMR, and as set", _COMPARISON_HEAD, _comparison_rows(result)),
        _equal_error(result["comparisons"]),
        f'<div class="figures">{"".join(_figures(result))}</div>',
        "<h2>Searching everybody (1:N)</h2>",
        _table(
            f"A gallery of {found['gallery']:,} people; strangers meet {found['gallery'] - 1:,}",
            _search_head(result),
            _search_rows(result),
        ),
        f"<p>{html.escape(_EXTRAPOLATED_NOTE)}</p>",
        "<h2>Photos that were refused</h2>",
        _table("Failure to acquire and to enrol, by reason", ("", ""), _failure_rows(result)),
    ]
    if result["protocol"]:
        parts += ["<h2>LFW's protocol</h2>", *(f"<p>{html.escape(one)}</p>" for one in _protocol(result))]
    if result["subgroups"]:
        left_out = result["subgroups"]["unnamed_people"]
        parts += [
            "<h2>By group</h2>",
            _table("Impostor pairs are two people of the same group", _SUBGROUP_HEAD, _subgroup_rows(result)),
            f"<p>{html.escape(_SUBGROUP_NOTE)} {left_out:,} people are in no group.</p>",
        ]
    parts += ["<h2>How this was measured</h2>", _METHOD]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _env(result: Result) -> list[str]:
    lines = [f"# {one['for'].upper()} {one['wanted']:g}\n{one['line']}" for one in result["recommended"] if one["line"]]
    return [
        f"<p>One of these lines belongs into <code>.env</code>:</p><pre>{html.escape(chr(10).join(lines))}</pre>"
    ] * bool(lines)


def _equal_error(pairs: Result) -> str:
    if pairs["equal_error_rate"] is None:
        return ""
    rate = per_cent(pairs["equal_error_rate"]) if pairs["equal_error_rate"] else "none seen"
    return f"<p>Equal error rate: {rate}, at {pairs['equal_error_threshold']:.4f}.</p>"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{html.escape(one)}</th>' for one in head)
    # An interval is broken before its bracket or not at all.
    cells = (
        [
            html.escape(cell).replace("&gt; ", "&gt;&nbsp;").replace(" %", "&nbsp;%").replace(" to ", "&nbsp;to&nbsp;")
            for cell in row
        ]
        for row in rows
    )
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    name = html.escape(caption)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )
