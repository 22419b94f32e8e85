"""The words of an evaluation: rates, tables and recommendations as text, and the summary for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from commands.evaluate.biometrics import ENOUGH_ERRORS

Result = Mapping[str, Any]
Format = Callable[[float], str]

# --- Numbers: an error that was not seen is never called "0 %", and less than all is never called "100 %" -----------


def per_cent(share: float) -> str:
    """A share with two or three significant digits: `12.3 %`, `0.098 %`, `> 99.9 %`."""
    value = 100 * share
    if 99.9 < value < 100:
        return "> 99.9 %"
    digits = 1 if value >= 10 else 2
    text = f"{value:.{digits}f}" if value >= 1 else np.format_float_positional(value, 2, fractional=False, trim="-")
    return f"{text} %"


def power_of_ten(share: float) -> str:
    """A share below 0.1 as `1.0·10⁻⁴`; a larger one in per cent."""
    if share == 0 or share >= 0.1:
        return per_cent(share)
    mantissa, exponent = f"{share:.1e}".split("e")
    return f"{mantissa}·{ten_to(int(exponent))}"


def ten_to(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def rate_text(rate: Result, form: Format = per_cent) -> str:
    """A rate with its interval; where no error was seen, the number of trials."""
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


def wanted_text(share: float) -> str:
    exponent = math.log10(share)
    return ten_to(round(exponent)) if abs(exponent - round(exponent)) < 1e-9 else power_of_ten(share)


# --- Sentences and tables --------------------------------------------------------------------------------------------


def introduction(result: Result) -> str:
    made, photos, pairs = result["made"], result["photos"], result["comparisons"]
    checks = "" if made["checks"] else ", without the checks (the widest face of each photo)"
    return (
        f"{photos['photos']:,} photos of {photos['people']:,} people ({made['folder']}), model "
        f"{made['model']}{checks}: {photos['templates']:,} templates of {photos['people_with_templates']:,} people, "
        f"{pairs['genuine_pairs']:,} genuine pairs (two photos of one person, from "
        f"{pairs['people_with_genuine_pairs']:,} people) and {pairs['impostor_pairs']:,} impostor pairs."
    )


def cautions(result: Result) -> list[str]:
    photos, made = result["photos"], result["made"]
    said = []
    if photos["files_of_two_people"]:
        said.append(
            f"{photos['files_of_two_people']:,} files lie in the folders of two people. One of the two is wrong, and "
            "each file counts as a false match: correct the folders first."
        )
    if photos["repeated_files"]:
        said.append(f"{photos['repeated_files']:,} files lie twice in one person's folder and count once.")
    if photos["ignored_files"]:
        said.append(
            f"{photos['ignored_files']:,} files were ignored: they have no photo's suffix, or do not lie directly in a "
            "person's folder."
        )
    if photos["people_with_templates"] < 100:
        said.append(
            f"{photos['people_with_templates']} people are few. All rates depend on them, so the intervals are wide."
        )
    if made["changed_limits"]:
        changed = ", ".join(f"{name}={value:g}" for name, value in made["changed_limits"].items())
        said.append(f"These limits differ from the defaults: {changed}.")
    if not result["comparisons"]["genuine_pairs"]:
        said.append("Nobody has two photos: nothing is known about misses (FNMR, FNIR).")
    said.append(
        "The rates hold for photos like these. Other cameras, ages and groups of people have other rates, and so have "
        "relatives and twins. Attacks (a photo of a photo, a mask made for an attack) are not tested here."
    )
    said.append(
        "A recommended threshold is chosen on the same photos that measure it, which makes it look a little better "
        "than it is: check it on other photos."
    )
    return said


def recommendation(one: Result, result: Result) -> str:
    """One recommended threshold with its error rates, or why there is none."""
    if one["for"] == "fmr":
        goal, trials = (
            f"FMR {wanted_text(one['wanted'])}",
            f"{result['comparisons']['impostor_pairs']:,} impostor pairs",
        )
    else:
        goal = f"FPIR {wanted_text(one['wanted'])} with {one['gallery_size']:,} enrolled"
        trials = f"{result['searches']['strangers']:,} searches"
        if one["extrapolated"]:
            goal += f" (extrapolated: it needs FMR {power_of_ten(one['fmr_needed'])})"
            trials = f"{result['comparisons']['impostor_pairs']:,} impostor pairs"
    if one["support"] == "not measurable":
        people = math.ceil((1 + math.sqrt(1 + 8 * one["trials_needed"])) / 2)
        such = "" if trials.endswith("searches") else f", such as one photo each of {people:,} people"
        return f"{goal}: not measurable with {trials}; it needs {one['trials_needed']:,}{such}."
    if one["threshold"] is None:
        return f"{goal}: no threshold reaches it, since too many impostor pairs have the score 1 (the same files?)."
    doubt = "" if one["support"] == "measured" else f" Uncertain: it rests on fewer than {ENOUGH_ERRORS} errors."
    return (
        f"{goal}: {one['line']} — FMR {rate_text(one['fmr'], power_of_ten)}, FNMR {rate_text(one['fnmr'])}, "
        f"FPIR {rate_text(one['fpir'])}, FNIR {rate_text(one['fnir'])}.{doubt}"
    )


def comparison_rows(result: Result) -> list[list[str]]:
    """Rows of wanted FMR, threshold, FMR, FNMR and FRR; a row that cannot be measured says so."""
    pairs = result["comparisons"]
    rows = []
    for row in pairs["rows"]:
        if row["threshold"] is None:
            why = f"not measurable with {pairs['impostor_pairs']:,} pairs"
            if row["support"] != "not measurable":
                why = "no threshold reaches it: too many scores are 1"
            rows.append([wanted_text(row["wanted_fmr"]), why, "-", "-", "-"])
            continue
        doubt = "" if row["support"] == "measured" else " (uncertain)"
        rows.append([wanted_text(row["wanted_fmr"]) + doubt, *_at(row)])
    rows.append(["(as set)", *_at(result["at_verify_threshold"])])
    return rows


def _at(row: Result) -> list[str]:
    attempt = per_cent(row["frr"]) if "frr" in row else "-"
    if attempt == "0 %":
        attempt = "none seen"
    return [f"{row['threshold']:.4f}", rate_text(row["fmr"], power_of_ten), rate_text(row["fnmr"]), attempt]


def search_rows(result: Result) -> list[list[str]]:
    rows = []
    for row in (*result["comparisons"]["rows"], result["at_verify_threshold"]):
        if row["threshold"] is not None:
            beyond = [_extrapolation(row["fmr"], one) for one in row["extrapolated_fpir"].values()]
            rows.append([f"{row['threshold']:.4f}", rate_text(row["fpir"]), rate_text(row["fnir"]), *beyond])
    return rows


def _extrapolation(fmr: Result, fpir: Result) -> str:
    """An extrapolated rate is never called certain, even if it is near 1."""
    if not fmr["errors"]:
        return "not known" if fpir["high"] > 0.999 else f"at most {per_cent(fpir['high'])}"
    return "> 99.9 %" if fpir["low"] > 0.999 else _with_interval({name: min(one, 0.9999) for name, one in fpir.items()})


def protocol(result: Result) -> list[str]:
    one = result["protocol"]
    said = [
        f"{_accuracy(one['all'])} (mean and standard error of "
        f"{one['folds']} folds, {one['pairs']:,} pairs; each fold uses the best threshold of the others: "
        f"{min(one['all']['thresholds']):.4f} to {max(one['all']['thresholds']):.4f})."
    ]
    if one["pairs_refused"] and one["compared"]:
        said.append(
            f"In {one['pairs_refused']:,} pairs a photo was refused. Such a pair counts as two different people. Of "
            f"the other pairs {_accuracy(one['compared'])} are right."
        )
    return said


def _accuracy(one: Result) -> str:
    return f"{100 * one['accuracy']:.2f} % ± {100 * one['standard_error']:.2f}"


COMPARISON_HEAD = ("wanted FMR", "threshold", "FMR (95 %)", "FNMR (95 %)", "FRR of attempts")


def search_head(result: Result) -> list[str]:
    sizes = result["at_verify_threshold"]["extrapolated_fpir"]
    return ["threshold", "FPIR (95 %)", "FNIR (95 %)", *(f"extrapolated FPIR, N = {int(one):,}" for one in sizes)]


def failure_rows(result: Result) -> list[list[str]]:
    found = result["failures"]
    return [
        ["photos refused (FTA)", rate_text(found["fta"])],
        *([f"… {code}", f"{count:,}"] for code, count in found["by_code"].items()),
        ["people whose first photo was refused (FTE)", rate_text(found["fte"])],
        ["people none of whose photos passed", f"{found['people_without_template']:,}"],
    ]


SUBGROUP_HEAD = ("group", "people", "photos refused", "threshold", "FMR within the group", "FNMR")


def subgroup_rows(result: Result) -> list[list[str]]:
    rows = []
    for name, group in result["subgroups"]["groups"].items():
        head = [name, f"{group['people']:,}", rate_text(group["fta"])]
        for row in group["rows"]:
            small = min(row["fmr"]["errors"], row["fnmr"]["errors"]) < ENOUGH_ERRORS
            rates = [rate_text(row["fmr"], power_of_ten), rate_text(row["fnmr"])]
            rows.append([*head, f"{row['threshold']:.4f}" + (" *" if small else ""), *rates])
    return rows


SUBGROUP_NOTE = (
    f"* fewer than {ENOUGH_ERRORS} errors of either kind: read the interval, not the rate. Two groups differ only "
    "where their intervals do. With many groups some differ by chance."
)
EXTRAPOLATED_NOTE = (
    "The extrapolated FPIR is 1 - (1 - FMR)^N, from the 1:1 rate. It would be right for N people if all comparisons "
    "were independent and equally likely to match falsely. They are not: there are relatives, and poor photos that "
    "match many people. Compare it with the measured FPIR before you use it for another N."
)


def summary(result: Result) -> str:
    """The most important results in plain text."""
    lines = [introduction(result), "", *_text_table((), failure_rows(result)), ""]
    lines += ["1:1, every photo against every other", *_text_table(COMPARISON_HEAD, comparison_rows(result)), ""]
    found = result["searches"]
    lines += [f"1:N, in a gallery of {found['gallery']:,} (one photo each; strangers: {found['gallery'] - 1:,})"]
    lines += [*_text_table(search_head(result)[:3], [row[:3] for row in search_rows(result)]), ""]
    if result["protocol"]:
        lines += ["LFW's protocol", *protocol(result), ""]
    if result["subgroups"]:
        lines += ["By group", *_text_table(SUBGROUP_HEAD, subgroup_rows(result)), SUBGROUP_NOTE, ""]
    lines += ["Recommended", *(recommendation(one, result) for one in result["recommended"]), ""]
    lines += ["Please note", *(f"- {one}" for one in cautions(result))]
    return "\n".join(lines) + "\n"


def _text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    shown = [*([head] if head else []), *rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)
    return [f"  {line.rstrip()}" for line in lines]
