"""The arithmetic of recognition errors: counts against brute force and by hand, intervals against the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from commands.evaluate import biometrics
from commands.evaluate.biometrics import (
    THRESHOLDS,
    Comparisons,
    Population,
    compare,
    extrapolated_fpir,
    fmr_for_fpir,
    fold_accuracies,
    rate_by_person,
    rates_at,
    search,
    support,
    wilson,
)
from engines.base import similarity_of


def at_angles(*degrees: list[float], cosine_at_half: float = 0.5) -> Population:
    """Templates on a circle: a list of angles for each person."""
    people = np.repeat(np.arange(len(degrees)), [len(one) for one in degrees])
    angles = np.radians([angle for one in degrees for angle in one])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return Population(vectors, people, cosine_at_half)


def a_crowd(people: int, rng: np.random.Generator, *, photos: int = 5) -> Population:
    """People who cluster around a few types and vary by different amounts, so that pairs depend on each other."""
    sizes = rng.integers(1, photos + 1, people)
    types = np.random.default_rng(1).normal(size=(8, 16))
    centres = rng.normal(size=(people, 16)) + 0.7 * types[rng.integers(0, 8, people)]
    whose = np.repeat(np.arange(people), sizes)
    spread = 0.5 * np.exp(0.4 * rng.normal(size=people))
    vectors = centres[whose] + spread[whose, None] * rng.normal(size=(len(whose), 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Population(vectors.astype(np.float32), whose, 0.5)


def brute_force(population: Population) -> tuple[biometrics.Floats, biometrics.Floats]:
    """Every genuine and every impostor score, one by one as the service computes them."""
    genuine: list[float] = []
    impostor: list[float] = []
    for a in range(len(population.people)):
        for b in range(a):
            cosine = float(population.vectors[a] @ population.vectors[b])
            scores = genuine if population.people[a] == population.people[b] else impostor
            scores.append(similarity_of(cosine, population.cosine_at_half))
    return np.array(genuine), np.array(impostor)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (95, 100, 0.8882, 0.9785),
        (0, 0, 0.0, 1.0),
    ],
)
def test_the_interval_is_wilsons(count: int, total: int, low: float, high: float) -> None:
    assert wilson(count, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(3, 3.1824), (5, 2.5706), (10, 2.2281), (29, 2.0452), (1000, 1.9623)]
)
def test_few_people_are_judged_by_students_t(degrees: int, quantile: float) -> None:
    assert biometrics._students_t(degrees) == pytest.approx(quantile, rel=0.01)


# --- 1:1 -------------------------------------------------------------------------------------------------------------


def test_the_false_match_rate_of_people_evenly_on_a_circle_is_that_of_the_arc() -> None:
    # 36 people, 10 degrees apart: within 35 degrees each one meets the 3 next to either side, of 35 others.
    population = at_angles(*([10.0 * one] for one in range(36)))
    pairs = compare(population)
    at = int(np.searchsorted(THRESHOLDS, math.cos(math.radians(35))))
    assert (pairs.impostor_pairs, pairs.genuine_pairs) == (36 * 35 // 2, 0)
    assert pairs.fmr[at] == pytest.approx(6 / 35)
    fmr, fnmr = rates_at(population, [math.cos(math.radians(35))])[0]
    assert (fmr.errors, fmr.trials) == (36 * 6 // 2, 36 * 35 // 2)
    assert (fnmr.trials, fnmr.share, fnmr.low, fnmr.high) == (0, None, 0.0, 1.0)


def test_a_score_at_the_threshold_is_a_match_as_in_the_service() -> None:
    vectors = np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]], np.float32)  # cosine 0.5, exactly
    for people, kind in (([0, 0], "genuine"), ([0, 1], "impostor")):
        population = Population(vectors, np.array(people), 0.5)
        counted = getattr(compare(population), kind)
        middle = int(np.searchsorted(THRESHOLDS, 0.5))
        assert (counted[middle], counted[middle + 1]) == (1, 0)
        fmr, fnmr = rates_at(population, [0.5])[0]
        assert (fmr.errors, fnmr.errors) == ((0, 0) if kind == "genuine" else (1, 0))


@pytest.mark.parametrize("cosine_at_half", [0.5, 0.94])
def test_similarities_are_the_services_own(cosine_at_half: float) -> None:
    population = at_angles([0, 10], [33, 77], [150], cosine_at_half=cosine_at_half)
    genuine, impostor = brute_force(population)
    pairs = compare(population)
    for threshold in (-1.0, -0.3, 0.0, 0.4, 0.7, 0.9):
        at = int(np.searchsorted(THRESHOLDS, threshold))
        assert pairs.genuine[at] == (genuine >= threshold).sum()
        assert pairs.impostor[at] == (impostor >= threshold).sum()


def test_counts_and_rates_are_those_of_brute_force_over_many_blocks() -> None:
    population = a_crowd(900, np.random.default_rng(0))
    assert len(list(population.blocks())) > 2
    scores = population.similarities(slice(None), slice(None))
    same = population.people[:, None] == population.people
    above = np.triu(np.ones_like(same), 1)
    pairs = compare(population)
    thresholds = (0.2, 0.5, 0.8)
    for threshold, (fmr, fnmr) in zip(thresholds, rates_at(population, thresholds), strict=True):
        matched = scores >= threshold
        at = int(np.searchsorted(THRESHOLDS, threshold))
        assert fmr.errors == pairs.impostor[at] == (matched & ~same & above).sum()
        assert fnmr.errors == pairs.genuine_pairs - pairs.genuine[at] == (~matched & same & above).sum()
        assert (fmr.trials, fnmr.trials) == ((~same & above).sum(), (same & above).sum())


def test_a_wanted_rate_gets_the_lowest_threshold_that_keeps_it() -> None:
    pairs = compare(a_crowd(60, np.random.default_rng(2)))
    for wanted in (0.1, 0.01):
        threshold = pairs.threshold_for(wanted)
        assert threshold is not None
        at = int(np.searchsorted(THRESHOLDS, threshold))
        assert pairs.fmr[at] <= wanted < pairs.fmr[at - 1]


def test_no_threshold_keeps_a_rate_that_different_people_with_one_picture_break() -> None:
    assert compare(at_angles([0], [0], [90])).threshold_for(0.1) is None


def test_the_equal_error_rate_is_where_the_two_rates_meet() -> None:
    reaching = np.zeros(len(THRESHOLDS), np.int64)
    genuine, impostor = reaching.copy(), reaching.copy()
    genuine[:15_001], impostor[:14_001] = 90, 10  # similarity 0.5 and 0.4
    genuine[:12_001] = impostor[:10_001] = 100
    assert Comparisons(genuine, impostor, 100, 100).equal_error_rate() == pytest.approx((0.2001, 0.1))


@pytest.mark.parametrize(
    ("wanted", "trials", "said"),
    [
        (1e-3, 2_999, "not measurable"),
        (1e-3, 3_000, "uncertain"),
        (1e-3, 29_999, "uncertain"),
        (1e-3, 30_000, "measured"),
    ],
)
def test_the_rules_of_three_and_of_thirty_say_what_can_be_measured(wanted: float, trials: int, said: str) -> None:
    assert support(wanted, trials) == said


def test_where_nothing_failed_people_are_counted_and_not_their_photos() -> None:
    population = at_angles(*([120.0 * one] * 10 for one in range(3)))
    fmr, fnmr = rates_at(population, [0.5])[0]
    assert (fmr.errors, fnmr.errors) == (0, 0)
    assert (fmr.trials, fmr.high) == (300, wilson(0, 3)[1])
    assert (fnmr.trials, fnmr.high) == (135, wilson(0, 3)[1])


def test_one_person_who_matches_everybody_widens_the_interval() -> None:
    # 40 false matches of 780 either way: all of one person, or of 40 pairs that share as few people as can be.
    everybody = np.zeros(40)
    everybody[0] = 39
    everybody[1:] = 1
    one = biometrics._rate(39, 780, everybody - 39 / 780 * 39, units=780)
    spread = biometrics._rate(39, 780, np.full(40, 39 * 2 / 40) - 39 / 780 * 39, units=780)
    assert spread.high - spread.low < one.high - one.low
    assert spread.low >= wilson(39, 780)[0] - 1e-12


def test_a_single_person_says_nothing_of_others() -> None:
    assert (rate_by_person([1], [10]).low, rate_by_person([1], [10]).high) == (0.0, 1.0)


def test_the_intervals_cover_the_truth_where_independent_pairs_would_not() -> None:
    truth = rates_at(a_crowd(1500, np.random.default_rng(3)), [0.6])[0]
    rng = np.random.default_rng(4)
    covered, naive = np.zeros(2), np.zeros(2)
    for _ in range(200):
        for kind, rate in enumerate(rates_at(a_crowd(60, rng), [0.6])[0]):
            true = truth[kind].share
            assert true is not None
            low, high = wilson(rate.errors, rate.trials)
            covered[kind] += rate.low <= true <= rate.high
            naive[kind] += low <= true <= high
    assert (covered / 200 > 0.87).all()
    assert (naive / 200 < 0.75).all()


# --- 1:N -------------------------------------------------------------------------------------------------------------


def test_strangers_do_not_meet_themselves_and_who_is_enrolled_must_be_the_nearest() -> None:
    # The gallery is 0, 40 and 180 degrees; 25 belongs to the first person, and is nearer to the second.
    searches = search(at_angles([0, 25, 5], [40], [180, 170]))
    assert searches.enrolled.tolist() == [True, False, False, True, True, False]
    assert searches.found.tolist() == [1, 1, 1, 0, 1, 1]
    at = math.cos(math.radians(37))
    # As strangers 25 (15 from 40) and 5 (35 from 40) are taken for somebody; 0 and 40 are 40 apart.
    assert (searches.fpir(at).errors, searches.fpir(at).trials) == (2, 6)
    # Of the three who are not the gallery's own photo, 25 is found as somebody else.
    assert (searches.fnir(at).errors, searches.fnir(at).trials) == (1, 3)
    strict = math.cos(math.radians(8))
    assert (searches.fpir(strict).errors, searches.fnir(strict).errors) == (0, 2)


def test_a_stranger_at_the_threshold_is_a_false_positive_as_in_the_service() -> None:
    vectors = np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]], np.float32)  # cosine 0.5, exactly
    searches = search(Population(vectors, np.array([0, 1]), 0.5))
    assert (searches.fpir(0.5).errors, searches.fpir(0.5001).errors) == (2, 0)
    assert searches.threshold_for(0.1) == 0.5001


def test_searches_are_those_of_brute_force() -> None:
    population = a_crowd(300, np.random.default_rng(5))
    searches = search(population)
    first = np.unique(population.people, return_index=True)[1]
    scores = population.similarities(slice(None), slice(None))[:, first]
    own = scores[np.arange(len(scores)), population.people]
    scores[np.arange(len(scores)), population.people] = -2
    assert searches.own == pytest.approx(own, abs=1e-6)
    assert searches.other == pytest.approx(scores.max(axis=1), abs=1e-6)
    threshold = searches.threshold_for(0.05)
    assert threshold is not None
    assert searches.fpir(threshold).errors <= 0.05 * len(scores) < (searches.other >= threshold - 0.0001).sum()


def test_an_extrapolated_rate_leads_back_to_its_false_match_rate() -> None:
    assert extrapolated_fpir(1e-6, 10_000) == pytest.approx(1 - (1 - 1e-6) ** 10_000)
    assert extrapolated_fpir(0.0, 10) == 0
    assert extrapolated_fpir(1.0, 10) == 1
    assert extrapolated_fpir(fmr_for_fpir(0.01, 10_000), 10_000) == pytest.approx(0.01)


# --- LFW's protocol --------------------------------------------------------------------------------------------------


def test_a_fold_is_judged_at_the_threshold_of_the_others() -> None:
    same = np.array([True, True, False, False])
    usual, odd = np.array([0.8, 0.7, 0.3, 0.2]), np.array([0.2, 0.1, 0.05, 0.0])
    accuracies, thresholds = fold_accuracies([usual, odd], [same] * 2)
    # At a threshold of its own either would be all right.
    assert accuracies.tolist() == [0.5, 0.5]
    assert thresholds.tolist() == [0.1, 0.7]


def test_a_pair_that_could_not_be_compared_is_taken_for_two_people() -> None:
    same = np.array([True, True, False, False])
    refused = np.array([-np.inf, 0.7, -np.inf, 0.2])
    accuracies, _ = fold_accuracies([refused, refused], [same, same])
    assert accuracies.tolist() == [0.75, 0.75]
