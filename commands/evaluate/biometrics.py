"""Computes recognition errors: FMR and FNMR, FPIR and FNIR, their intervals, and thresholds for wanted rates.

Scores are similarities on the API's scale, and a score at the threshold is a match, as in the service. Everything is
counted in blocks: of 13,000 templates (88 million pairs) no more than a few million scores exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Every VERIFY_THRESHOLD to the four decimals that the API shows.
THRESHOLDS: Floats = np.arange(-10_000, 10_001) / 10_000

# ISO/IEC 19795-1, annex B. Fewer than 3 expected errors show nothing (the rule of 3). From 30 errors on a rate is known
# to within 30 % of itself, nine times in ten (the rule of 30, Doddington 2000).
LEAST_ERRORS, ENOUGH_ERRORS = 3, 30

_Z = 1.959964
_BLOCK_SCORES = 2_000_000


@dataclass(frozen=True)
class Rate:
    """An error rate: errors of trials, with its 95 % interval (0...1)."""

    errors: int
    trials: int
    low: float
    high: float

    @property
    def share(self) -> float | None:
        """The rate, 0...1; None if there was no trial."""
        return self.errors / self.trials if self.trials else None

    def as_json(self) -> dict[str, Any]:
        return {"errors": self.errors, "trials": self.trials, "share": self.share, "low": self.low, "high": self.high}


# --- Intervals -------------------------------------------------------------------------------------------------------


def wilson(count: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927); 0 to 1 if there is nothing to count."""
    if total <= 0:
        return 0.0, 1.0
    share, weight = count / total, 1 + _Z * _Z / total
    middle = (share + _Z * _Z / (2 * total)) / weight
    half = _Z / weight * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate_by_person(errors: npt.ArrayLike, trials: npt.ArrayLike) -> Rate:
    """A rate whose trials belong to one person each (FNMR, FNIR, FTA): people are independent, their photos are not.

    Args:
        errors, trials: int[people], how many of each person's trials failed, and how many there were.
    """
    wrong, tried = (np.asarray(one, np.int64) for one in (errors, trials))
    wrong, tried = wrong[tried > 0], tried[tried > 0]
    residuals = wrong - tried * (wrong.sum() / max(1, tried.sum()))
    return _rate(int(wrong.sum()), int(tried.sum()), residuals, units=len(tried))


def _rate(errors: int, trials: int, residuals: Floats, *, units: float) -> Rate:
    """A rate with Wilson's interval at the effective number of trials (Korn and Graubard 1998).

    That number is what independent trials would need to be as uncertain as these are: share (1 - share) / variance,
    corrected by Student's t for few people, and never more than there were.

    Args:
        errors, trials: the counts.
        residuals: float64[people], the errors in which each person has a part beyond the expected ones.
        units: counts as the number of trials where nothing (or everything) failed, which leaves no variance to see.
    """
    people = len(residuals)
    if trials == 0 or people < 2:
        return Rate(errors, trials, 0.0, 1.0)
    share, effective = errors / trials, units
    if 0 < errors < trials:
        variance = float((residuals**2).sum()) / trials**2 * people / (people - 1)
        independent = share * (1 - share) / variance if variance > 0 else trials
        effective = min(trials, independent * (_Z / _students_t(people - 1)) ** 2)
    return Rate(errors, trials, *wilson(share * effective, effective))


def _students_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, expanded around the normal's (Abramowitz and Stegun 26.7.5)."""
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / degrees + second / degrees**2 + third / degrees**3


# --- 1:1: every photo against every other ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Population:
    """Templates and the person of each; the templates of one person are together.

    Attributes:
        vectors: float32[n, d] of norm 1.
        people: int64[n], ascending from 0 without a gap: the person of each template.
        cosine_at_half: the cosine that reads as similarity 0.5.
    """

    vectors: npt.NDArray[np.float32]
    people: Integers
    cosine_at_half: float

    @property
    def sizes(self) -> Integers:
        """int64[people]: how many templates each person has."""
        return np.bincount(self.people).astype(np.int64)

    def similarities(self, rows: slice, columns: slice | Integers) -> Floats:
        """float64[rows, columns]: `engine.similarity_of` every pair."""
        cosines = self.vectors[rows] @ self.vectors[columns].T
        return 1.0 - (1.0 - cosines.astype(np.float64)) / (2.0 * (1.0 - self.cosine_at_half))

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Yield rows of whole people, and their similarities to these and all later rows; -inf if it is no new pair."""
        edges = np.append(0, np.cumsum(self.sizes))
        first = 0
        while first < len(edges) - 1:
            row = int(edges[first])
            rows = _BLOCK_SCORES // (int(edges[-1]) - row)
            first = max(first + 1, int(np.searchsorted(edges, row + rows, side="right")) - 1)
            end = int(edges[first])
            scores = self.similarities(slice(row, end), slice(row, None))
            scores[np.tril_indices(end - row, 0, scores.shape[1])] = -np.inf
            yield slice(row, end), scores


def _starts(sizes: Integers) -> Integers:
    return np.cumsum(sizes) - sizes


@dataclass(frozen=True)
class Comparisons:
    """The scores of all pairs: int64[20001], how many reach each of `THRESHOLDS`; and how many pairs there are."""

    genuine: Integers
    impostor: Integers
    genuine_pairs: int
    impostor_pairs: int

    @property
    def fmr(self) -> Floats:
        return self.impostor / max(1, self.impostor_pairs)

    @property
    def fnmr(self) -> Floats:
        return 1 - self.genuine / max(1, self.genuine_pairs)

    def threshold_for(self, fmr: float) -> float | None:
        """The lowest threshold with at most this FMR; None if even the threshold 1 has a higher one."""
        return lowest_threshold(self.impostor, fmr * self.impostor_pairs)

    def equal_error_rate(self) -> tuple[float, float]:
        """The threshold where FMR and FNMR are nearest to each other, and their mean there."""
        at = int(np.abs(self.fmr - self.fnmr).argmin())
        return float(THRESHOLDS[at]), float(self.fmr[at] + self.fnmr[at]) / 2


def compare(population: Population) -> Comparisons:
    """Count the scores of all pairs: genuine (two photos of one person) and impostor (photos of two people)."""
    counts = np.zeros((2, len(THRESHOLDS) + 1), np.int64)
    for rows, scores in population.blocks():
        same = population.people[rows, None] == population.people[None, rows.start :]
        new = scores > -np.inf
        for kind, chosen in enumerate((scores[same & new], scores[~same & new])):
            places = np.searchsorted(THRESHOLDS, chosen, side="right")
            counts[kind] += np.bincount(places, minlength=counts.shape[1])
    genuine, impostor = (np.cumsum(one[::-1])[::-1][1:] for one in counts)
    pairs = counts.sum(axis=1)
    return Comparisons(genuine, impostor, int(pairs[0]), int(pairs[1]))


def lowest_threshold(reaching: Integers, allowed: float) -> float | None:
    """The lowest of `THRESHOLDS` that at most `allowed` scores reach; None if more reach 1 as well."""
    kept = np.flatnonzero(reaching <= allowed + 1e-9)
    return float(THRESHOLDS[kept[0]]) if len(kept) else None


def support(wanted: float, trials: int) -> str:
    """Whether a rate can be measured with so many trials: `measured`, `uncertain` or `not measurable` (rules of 3, 30).

    Args:
        wanted: the rate, 0...1.
        trials: how many comparisons or searches there are.
    """
    expected = wanted * trials
    if expected < LEAST_ERRORS:
        return "not measurable"
    return "measured" if expected >= ENOUGH_ERRORS else "uncertain"


def rates_at(population: Population, thresholds: Sequence[float]) -> list[tuple[Rate, Rate]]:
    """FMR and FNMR at each threshold, with intervals that take into account which pairs share people.

    People are independent, so an FNMR's variance is the sum of squares of each person's share of the error. A pair
    of two people adds to both, hence its own chance counts twice and the FMR's intervals come out a little wide (as a
    bootstrap over people would have them): simulated, 30 to 300 people, the nominal 95 % cover the true FMR 95 to
    99 times in 100 and the true FNMR 88 to 96 times, where independent pairs would 22 to 99 and 52 to 64 times.
    """
    sizes = population.sizes
    people, starts = len(sizes), _starts(sizes)
    matched, false = (np.zeros((len(thresholds), people), np.int64) for _ in range(2))
    for rows, scores in population.blocks():
        first, last = (int(one) for one in np.searchsorted(starts, (rows.start, rows.stop)))
        inside = np.arange(last - first)
        for at, threshold in enumerate(thresholds):
            by_row = np.add.reduceat(scores >= threshold, starts[first:] - rows.start, axis=1, dtype=np.int64)
            pairs = np.add.reduceat(by_row, starts[first:last] - rows.start, axis=0)
            matched[at, first:last] = pairs[inside, inside]
            pairs[inside, inside] = 0
            false[at, first:last] += pairs.sum(axis=1)
            false[at, first:] += pairs.sum(axis=0)
    genuine, impostor = sizes * (sizes - 1) // 2, sizes * (sizes.sum() - sizes)
    trials = int(impostor.sum()) // 2
    rates = []
    for wrong, right in zip(false, matched, strict=True):
        errors = int(wrong.sum()) // 2
        residuals = wrong - impostor * (errors / max(1, trials))
        # Where nothing matched falsely, each two people count as one trial.
        fmr = _rate(errors, trials, residuals, units=people * (people - 1) / 2)
        rates.append((fmr, rate_by_person(genuine - right, genuine)))
    return rates


# --- 1:N: every photo against a gallery of one photo a person --------------------------------------------------------


@dataclass(frozen=True)
class Searches:
    """Searches of a gallery that holds the first template of every person.

    Attributes:
        people: int64[n], the person of the template that searched.
        enrolled: bool[n], whether the template is in the gallery. It cannot search for itself, but as a stranger.
        own: float64[n], similarity to the person's own entry.
        other: float64[n], similarity to the nearest other person: the answer if the person is a stranger.
        found: int64[n], that other person.
    """

    people: Integers
    enrolled: npt.NDArray[np.bool_]
    own: Floats
    other: Floats
    found: Integers

    def fpir(self, threshold: float) -> Rate:
        """False positive identification rate: everybody searches as a stranger, without the own entry.

        A search adds to the error of who searched and of who was found (as a pair does in `rates_at`).
        """
        wrong = self.other >= threshold
        residuals = wrong - wrong.mean()
        people = int(self.people[-1]) + 1
        by_person = np.bincount(self.people, residuals) + np.bincount(self.found, residuals, minlength=people)
        return _rate(int(wrong.sum()), len(wrong), np.asarray(by_person, np.float64), units=people)

    def fnir(self, threshold: float) -> Rate:
        """False negative identification rate: an enrolled person is not found, or another person is nearer."""
        missed = ~self.enrolled & ((self.own < threshold) | (self.other >= self.own))
        return rate_by_person(np.bincount(self.people, missed), np.bincount(self.people, ~self.enrolled))

    def threshold_for(self, fpir: float) -> float | None:
        """The lowest threshold with at most this FPIR; None if even the threshold 1 has a higher one."""
        reaching = len(self.other) - np.searchsorted(np.sort(self.other), THRESHOLDS, side="left")
        return lowest_threshold(reaching.astype(np.int64), fpir * len(self.other))


def search(population: Population) -> Searches:
    """Search for every template in a gallery of the first template of each of two or more people."""
    gallery = _starts(population.sizes)
    count = len(population.people)
    own, other, found = np.empty(count), np.empty(count), np.empty(count, np.int64)
    step = max(1, _BLOCK_SCORES // len(gallery))
    for start in range(0, count, step):
        rows = slice(start, min(count, start + step))
        scores = population.similarities(rows, gallery)
        inside = np.arange(len(scores))
        own[rows] = scores[inside, population.people[rows]]
        scores[inside, population.people[rows]] = -np.inf
        found[rows] = scores.argmax(axis=1)
        other[rows] = scores[inside, found[rows]]
    enrolled = np.zeros(count, bool)
    enrolled[gallery] = True
    return Searches(population.people, enrolled, own, other, found)


def extrapolated_fpir(fmr: float, gallery_size: int) -> float:
    """1 - (1 - FMR)^N: the FPIR of N people if their comparisons were independent and equally likely to match."""
    return -math.expm1(gallery_size * math.log1p(-fmr)) if fmr < 1 else 1.0


def fmr_for_fpir(fpir: float, gallery_size: int) -> float:
    """The FMR whose `extrapolated_fpir` is `fpir`, 0 < fpir < 1."""
    return -math.expm1(math.log1p(-fpir) / gallery_size)


# --- LFW's protocol --------------------------------------------------------------------------------------------------


def fold_accuracies(scores: Sequence[Floats], same: Sequence[npt.NDArray[np.bool_]]) -> tuple[Floats, Floats]:
    """The accuracy of each fold at the best threshold of the other folds, and these thresholds.

    Args:
        scores: float64[pairs] of each of two or more folds; -inf for a pair that could not be compared.
        same: bool[pairs] of each fold, whether both photos show one person.
    """
    accuracies, thresholds = [], []
    for fold, answer in zip(range(len(scores)), same, strict=True):
        others = [one for one in range(len(scores)) if one != fold]
        threshold = _most_accurate(
            np.concatenate([scores[one] for one in others]), np.concatenate([same[one] for one in others])
        )
        thresholds.append(threshold)
        accuracies.append(float(((scores[fold] >= threshold) == answer).mean()))
    return np.array(accuracies), np.array(thresholds)


def _most_accurate(scores: Floats, same: npt.NDArray[np.bool_]) -> float:
    """The threshold with the most right answers; the middle one of several."""
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    tried = np.append(np.unique(scores[np.isfinite(scores)]), 2.0)  # 2: nobody matches
    right = len(genuine) - np.searchsorted(genuine, tried, "left") + np.searchsorted(impostor, tried, "left")
    best = tried[right == right.max()]
    return float(best[len(best) // 2])
