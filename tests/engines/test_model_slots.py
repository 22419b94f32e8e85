"""Who gets to the models next, who waits, and who is refused."""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import ExitStack

import pytest

from engines.model_slots import FIRST_MODEL_SECONDS, Client, ModelSlots
from errors import FaceError

ALICE, BOB = ("alice", "192.0.2.1"), ("bob", "192.0.2.2")


class Line:
    """Photos that wait while the one slot is held, each in a thread; `served` tells in which order they got it."""

    def __init__(self, longest_wait_s: float = math.inf, slots: int = 1, *, holding_s: float = 0.0) -> None:
        self.slots, self.holding_s = ModelSlots(slots, longest_wait_s), holding_s
        self.served: list[str] = []
        self.threads: list[threading.Thread] = []

    def join(self, name: str, client: Client = ALICE, decoding_s: float = 0.0) -> None:
        def wait() -> None:
            with self.slots.slot(client, decoding_s):
                self.served.append(name)
                time.sleep(self.holding_s)

        before = len(self.slots._waiting)
        self.threads.append(threading.Thread(target=wait, daemon=True))
        self.threads[-1].start()
        while len(self.slots._waiting) == before:
            time.sleep(0.001)

    def serve(self) -> list[str]:
        for thread in self.threads:
            thread.join(10)
        return self.served


def test_photos_of_one_client_get_the_models_in_the_order_of_asking_and_nobody_gets_in_between() -> None:
    line = Line()
    with line.slots.slot(ALICE):
        for name in "abcdef":
            line.join(name)
    late = threading.Thread(target=lambda: line.slots.slot(ALICE).__enter__(), daemon=True)
    late.start()
    assert line.serve() == [*"abcdef"]


def test_clients_take_turns() -> None:
    line = Line(holding_s=0.1)  # turns go by time, and a busy machine holds up a thread for less
    with line.slots.slot(ALICE):
        for name in ("a1", "a2", "a3", "a4"):
            line.join(name, ALICE)
        line.join("b1", BOB)
        line.join("b2", BOB)
    assert line.serve()[:4] in (["b1", "a1", "b2", "a2"], ["a1", "b1", "a2", "b2"], ["b1", "b2", "a1", "a2"])


def test_api_keys_take_turns_however_many_addresses_one_of_them_has() -> None:
    line = Line()
    with line.slots.slot(ALICE):
        for number in range(6):
            line.join(f"a{number}", ("alice", f"192.0.2.{number}"))
        line.join("b", BOB)
    assert "b" in line.serve()[:2]


def test_addresses_of_one_api_key_take_turns() -> None:
    line = Line()
    with line.slots.slot(("alice", "flood")):
        for number in range(6):
            line.join(f"a{number}", ("alice", "flood"))
        line.join("b", ("alice", "other"))
    assert "b" in line.serve()[:2]


def test_a_client_whose_photo_takes_long_lets_the_others_go_first() -> None:
    line, over = Line(slots=2), threading.Event()

    def decode_slowly() -> None:
        with line.slots.slot(ALICE, 100.0):
            assert over.wait(10)

    slow = threading.Thread(target=decode_slowly, daemon=True)
    with line.slots.slot(BOB):
        slow.start()
        while line.slots.queue()[1] < 2:
            time.sleep(0.001)
        line.join("alice", ALICE, decoding_s=100.0)
        line.join("bob", BOB)
    assert line.serve() == ["bob", "alice"]
    over.set()
    slow.join(10)


def test_a_photo_that_would_wait_too_long_is_refused_and_told_for_how_long() -> None:
    line = Line(longest_wait_s=10.0)
    with line.slots.slot(ALICE):
        line.join("slow", ALICE, decoding_s=11.0)
        with pytest.raises(FaceError, match="overloaded") as refusal, line.slots.slot(ALICE, 1.0):
            pytest.fail("it waited")
        assert 11 <= int(refusal.value.headers["Retry-After"]) <= 12
        # The flood of one client is no reason to refuse another: it is that one's turn first.
        line.join("other", BOB)
    assert line.serve() == ["other", "slow"]


def test_a_place_too_many_is_refused() -> None:
    slots = ModelSlots(1, math.inf, most_places=2)
    with slots.place(), slots.place(), pytest.raises(FaceError, match="overloaded"), slots.place():
        pytest.fail("there is no third")
    with slots.place():
        pass


def test_the_pace_of_this_machine_is_learnt() -> None:
    slots = ModelSlots(1, longest_wait_s=FIRST_MODEL_SECONDS / 2)
    with slots.slot(ALICE), pytest.raises(FaceError), slots.slot(BOB):
        pytest.fail("it is too slow by what is known of it")
    for _ in range(50):
        with slots.slot(ALICE):
            pass
    served = threading.Event()

    def wait() -> None:
        with slots.slot(BOB):
            served.set()

    with slots.slot(ALICE):
        threading.Thread(target=wait, daemon=True).start()
        while not slots._waiting:
            time.sleep(0.001)
    assert served.wait(10)


def test_it_is_told_how_many_wait_for_the_models_and_how_many_are_in_them() -> None:
    slots = ModelSlots(2, 3.0)
    with ExitStack() as places:
        for _ in range(4):
            places.enter_context(slots.place())
        with slots.slot():
            assert slots.queue() == (3, 1)
    assert slots.queue() == (0, 0)


def test_a_photo_that_fails_or_is_given_up_while_it_waits_leaves_the_models_to_the_next() -> None:
    slots = ModelSlots(1, 8.0)
    with pytest.raises(ValueError, match="fails"), slots.slot():
        raise ValueError("fails")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    served = threading.Event()

    def wait_too() -> None:
        with slots.slot():
            served.set()

    with slots.slot():
        threading.Thread(target=wait_too, daemon=True).start()
        while not slots._waiting:
            time.sleep(0.001)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt), slots.slot():
            pytest.fail("two at once")
        signal.signal(signal.SIGALRM, before)
        assert not served.wait(0.2)
    assert served.wait(10)
    with slots.slot():
        assert slots.queue() == (0, 1)


def test_nothing_is_remembered_of_clients_that_are_gone() -> None:
    slots = ModelSlots(2, math.inf)
    for number in range(100):
        with slots.slot((f"key {number}", "192.0.2.1")):
            pass
    assert slots._had == {}
