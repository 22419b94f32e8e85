"""Computes an evaluation: error rates, recommended thresholds, LFW's protocol and subgroups, from the templates."""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from commands.evaluate.biometrics import (
    LEAST_ERRORS,
    THRESHOLDS,
    Comparisons,
    Population,
    Rate,
    Searches,
    compare,
    extrapolated_fpir,
    fmr_for_fpir,
    fold_accuracies,
    rate_by_person,
    rates_at,
    search,
    support,
)
from commands.evaluate.cache import Outcome, limits
from commands.evaluate.data import Pair
from engines.base import Engine
from settings import Settings

WANTED_FMRS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
GALLERY_SIZES = (1_000, 10_000, 100_000)


def evaluation(
    people: Mapping[str, Sequence[Path]],
    outcomes: Mapping[Path, Outcome],
    engine: Engine,
    settings: Settings,
    arguments: argparse.Namespace,
    *,
    folds: Sequence[Sequence[Pair]] = (),
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that the report shows, as report.json holds it; no template and no person's name is in it.

    Raises:
        ValueError: fewer than two people have a template.
    """
    population, usable, repeats = _population(people, outcomes, engine.cosine_at_half)
    failures = _failures(people, outcomes)
    pairs, searches = compare(population), search(population)
    strangers_meet = len(usable) - 1  # their own entry is withheld
    recommended = [
        _for_fmr(pairs, arguments.wanted_fmr),
        _for_fpir(pairs, searches, arguments.wanted_fpir, arguments.gallery_size, strangers_meet),
    ]
    rows: list[dict[str, Any]] = [{"wanted_fmr": wanted} for wanted in WANTED_FMRS]
    for row in rows:
        row["support"] = support(row["wanted_fmr"], pairs.impostor_pairs)
        measurable = row["support"] != "not measurable"
        row["threshold"] = pairs.threshold_for(row["wanted_fmr"]) if measurable else None
    at_present = {"threshold": settings.verify_threshold}
    described = [row for row in (at_present, *rows, *recommended) if row["threshold"] is not None]
    measured = rates_at(population, [row["threshold"] for row in described])
    for row, (fmr, fnmr) in zip(described, measured, strict=True):
        row.update(_errors(fmr, fnmr, failures, searches, row["threshold"]))
        row["extrapolated_fpir"] = {
            str(size): _extrapolated(fmr, size)
            for size in sorted({strangers_meet, *GALLERY_SIZES, recommended[1]["gallery_size"]})
        }
    eer_threshold, eer = pairs.equal_error_rate()
    return {
        "made": {
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "folder": arguments.dir.resolve().name,
            "model": engine.name,
            "checks": not arguments.without_checks,
            "limits": limits(settings),
            "changed_limits": {k: v for k, v in limits(settings).items() if v != limits(Settings())[k]},
        },
        "photos": {
            "people": len(people),
            "photos": sum(len(photos) for photos in people.values()),
            "templates": len(population.people),
            "people_with_templates": len(usable),
            **repeats,
        },
        "failures": {name: one.as_json() if isinstance(one, Rate) else one for name, one in failures.items()},
        "comparisons": {
            "genuine_pairs": pairs.genuine_pairs,
            "impostor_pairs": pairs.impostor_pairs,
            "people_with_genuine_pairs": int((population.sizes > 1).sum()),
            "equal_error_rate": eer if pairs.genuine_pairs else None,
            "equal_error_threshold": eer_threshold if pairs.genuine_pairs else None,
            "rows": rows,
        },
        "searches": {"gallery": len(usable), "mated": int((~searches.enrolled).sum()), "strangers": len(searches.own)},
        "at_verify_threshold": at_present,
        "recommended": recommended,
        "protocol": _protocol(folds, outcomes, engine.cosine_at_half) if folds else None,
        "subgroups": _subgroups(population, usable, people, outcomes, groups, at_present, recommended[0])
        if groups
        else None,
        "curves": _curves(pairs, searches),
    }


def _population(
    people: Mapping[str, Sequence[Path]], outcomes: Mapping[Path, Outcome], cosine_at_half: float
) -> tuple[Population, list[str], dict[str, int]]:
    """The templates, the names of the people who have one, and how many files appear more than once."""
    usable, templates = [], []
    seen: dict[str, str] = {}
    repeats = {"repeated_files": 0, "files_of_two_people": 0}
    for name, photos in people.items():
        mine = []
        for outcome in (outcomes[one] for one in photos):
            if seen.get(outcome.digest) == name:
                repeats["repeated_files"] += 1  # the same file twice would count as a perfect genuine pair
                continue
            repeats["files_of_two_people"] += outcome.digest in seen
            seen[outcome.digest] = name
            if outcome.template is not None:
                mine.append(outcome.template)
        if mine:
            usable.append(name)
            templates.append(np.stack(mine))
    if len(usable) < 2:
        raise ValueError("fewer than two people have a photo that passed: there is nothing to compare")
    whose = np.repeat(np.arange(len(usable)), [len(one) for one in templates])
    return Population(np.concatenate(templates), whose, cosine_at_half), usable, repeats


def _failures(people: Mapping[str, Sequence[Path]], outcomes: Mapping[Path, Outcome]) -> dict[str, Any]:
    """FTA: every photo is an attempt. FTE: each person enrols with the first photo."""
    refused = {name: [outcomes[one].template is None for one in photos] for name, photos in people.items()}
    codes = Counter(one.code for one in outcomes.values() if one.code)
    return {
        "fta": rate_by_person([sum(one) for one in refused.values()], [len(one) for one in refused.values()]),
        "fte": rate_by_person([one[0] for one in refused.values()], [1] * len(refused)),
        "people_without_template": sum(all(one) for one in refused.values()),
        "by_code": dict(codes.most_common()),
    }


def _errors(fmr: Rate, fnmr: Rate, failures: Mapping[str, Any], searches: Searches, threshold: float) -> dict[str, Any]:
    """The rates at one threshold. The rates of attempts include refused photos, by ISO/IEC 19795-1's formulas."""
    fta, fte = failures["fta"].share, failures["fte"].share
    found = {"fmr": fmr.as_json(), "fnmr": fnmr.as_json()}
    if fnmr.share is not None and fmr.share is not None:
        frr = fta + fnmr.share * (1 - fta)
        found["far"], found["frr"] = fmr.share * (1 - fta), frr
        found["gfar"], found["gfrr"] = found["far"] * (1 - fte), fte + (1 - fte) * frr
    return {**found, "fpir": searches.fpir(threshold).as_json(), "fnir": searches.fnir(threshold).as_json()}


def _extrapolated(fmr: Rate, size: int) -> dict[str, float]:
    """1 - (1 - FMR)^N of an FMR and of the ends of its interval."""
    ends = {"share": fmr.share or 0.0, "low": fmr.low, "high": fmr.high}
    return {name: extrapolated_fpir(one, size) for name, one in ends.items()}


def _for_fmr(pairs: Comparisons, wanted: float) -> dict[str, Any]:
    evidence = support(wanted, pairs.impostor_pairs)
    threshold = pairs.threshold_for(wanted) if evidence != "not measurable" else None
    return {"for": "fmr", "wanted": wanted, **_recommended(threshold, evidence, wanted)}


def _for_fpir(
    pairs: Comparisons, searches: Searches, wanted: float, gallery_size: int | None, measured_size: int
) -> dict[str, Any]:
    """Measured if the gallery has the size of the one here; otherwise by the FMR that its size needs."""
    size = gallery_size or measured_size
    extrapolated = size not in (measured_size, measured_size + 1)
    rate, trials = (fmr_for_fpir(wanted, size), pairs.impostor_pairs) if extrapolated else (wanted, len(searches.own))
    evidence = support(rate, trials)
    threshold = None
    if evidence != "not measurable":
        threshold = pairs.threshold_for(rate) if extrapolated else searches.threshold_for(wanted)
    asked = {"for": "fpir", "wanted": wanted, "gallery_size": size, "extrapolated": extrapolated}
    return {**asked, "fmr_needed": rate if extrapolated else None, **_recommended(threshold, evidence, rate)}


def _recommended(threshold: float | None, evidence: str, rate: float) -> dict[str, Any]:
    line = None if threshold is None else f"VERIFY_THRESHOLD={threshold:g}"
    return {"threshold": threshold, "support": evidence, "line": line, "trials_needed": round(LEAST_ERRORS / rate)}


def _protocol(
    folds: Sequence[Sequence[Pair]], outcomes: Mapping[Path, Outcome], cosine_at_half: float
) -> dict[str, Any]:
    """LFW's protocol: each fold's accuracy at the others' best threshold. A refused photo matches nobody."""

    def similarity(pair: Pair) -> float:
        ends = [outcomes[one].template for one in pair.photos]
        if ends[0] is None or ends[1] is None:
            return -np.inf
        two = Population(np.stack([ends[0], ends[1]]), np.array([0, 1]), cosine_at_half)
        return float(two.similarities(slice(0, 1), slice(1, 2))[0, 0])

    scores = [np.array([similarity(pair) for pair in fold]) for fold in folds]
    same = [np.array([pair.same for pair in fold]) for fold in folds]
    found: dict[str, Any] = {"folds": len(folds), "pairs": sum(len(fold) for fold in folds)}
    found["pairs_refused"] = int(sum(np.isinf(one).sum() for one in scores))
    compared = [np.isfinite(one) for one in scores]
    for name, chosen in (("all", [np.full(len(one), True) for one in scores]), ("compared", compared)):
        found[name] = None
        if not all(one.any() for one in chosen):
            continue
        accuracies, thresholds = fold_accuracies(
            [one[kept] for one, kept in zip(scores, chosen, strict=True)],
            [one[kept] for one, kept in zip(same, chosen, strict=True)],
        )
        found[name] = {
            "accuracy": float(accuracies.mean()),
            "standard_error": float(accuracies.std(ddof=1) / np.sqrt(len(accuracies))),
            "accuracies": accuracies.tolist(),
            "thresholds": thresholds.tolist(),
        }
    return found


def _subgroups(
    population: Population,
    usable: Sequence[str],
    people: Mapping[str, Sequence[Path]],
    outcomes: Mapping[Path, Outcome],
    groups: Mapping[str, str],
    *described: Mapping[str, Any],
) -> dict[str, Any]:
    """FMR between people of one group, FNMR and FTA of its people, at the thresholds of `described`."""
    thresholds = sorted({one["threshold"] for one in described} - {None})
    found: dict[str, Any] = {}
    for group in sorted(set(groups.values())):
        members = [number for number, name in enumerate(usable) if groups.get(name) == group]
        chosen = np.isin(population.people, members)
        entry: dict[str, Any] = {"people": len(members), "templates": int(chosen.sum()), "rows": []}
        mine = {name: photos for name, photos in people.items() if groups.get(name) == group}
        entry["fta"] = _failures(mine, {one: outcomes[one] for photos in mine.values() for one in photos})[
            "fta"
        ].as_json()
        if members:
            own = np.searchsorted(members, population.people[chosen]).astype(np.int64)
            part = Population(population.vectors[chosen], own, population.cosine_at_half)
            for threshold, (fmr, fnmr) in zip(thresholds, rates_at(part, thresholds), strict=True):
                entry["rows"].append({"threshold": threshold, "fmr": fmr.as_json(), "fnmr": fnmr.as_json()})
        found[group] = entry
    return {"unnamed_people": sum(name not in groups for name in people), "groups": found}


def _curves(pairs: Comparisons, searches: Searches) -> dict[str, Any]:
    """The data of the figures: rates in steps of 0.002 of similarity, and the scores in bins of 0.01."""
    own = np.sort(np.where(searches.own > searches.other, searches.own, -np.inf)[~searches.enrolled])
    other = np.sort(searches.other)
    steps = slice(None, None, 20)
    grid = THRESHOLDS[steps]
    fpir = 1 - np.searchsorted(other, grid) / max(1, len(other))
    fnir = np.searchsorted(own, grid) / max(1, len(own))
    bins = slice(None, None, 100)
    return {
        "thresholds": grid.tolist(),
        "fmr": pairs.fmr[steps].tolist(),
        "fnmr": pairs.fnmr[steps].tolist(),
        "fpir": fpir.tolist(),
        "fnir": fnir.tolist(),
        "bins": THRESHOLDS[bins].tolist(),
        # The last bin is the threshold 1 itself.
        "genuine": (-np.diff(pairs.genuine[bins], append=0)).tolist(),
        "impostor": (-np.diff(pairs.impostor[bins], append=0)).tolist(),
    }
