"""Signs of life among processes, with a store in this process and a clock that the tests set."""

import threading

import pytest

from latentmem import pulse as module
from latentmem.pulse import SILENCE_SECONDS, Pulse


class Store(dict):
    """As torch's, but that none of its calls waits."""

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()

    set = dict.__setitem__


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def three(clock):
    """Three processes, and what they lost."""
    store, lost = Store(), {}
    return [Pulse(store, rank, 3, lambda silent, rank=rank: lost.update({rank: silent})) for rank in range(3)], lost


def test_a_process_that_falls_silent_is_lost_by_its_number_and_no_other(clock, three):
    pulses, lost = three
    for second in range(0, 2 * int(SILENCE_SECONDS), 5):
        for pulse in pulses[: 3 if second < 50 else 2]:  # the last one beats for 50 seconds
            pulse.beat()
            pulse.watch()
        if second <= 45 + SILENCE_SECONDS:
            assert lost == {}
        clock[0] += 5
    assert lost == {0: [2], 1: [2]}


def test_a_process_that_never_gave_a_sign_is_lost_too(clock, three):
    pulses, lost = three
    clock[0] += SILENCE_SECONDS + 1
    pulses[0].beat()
    pulses[0].watch()
    assert lost == {0: [1, 2]}


def test_one_that_ended_as_it_should_is_not_lost(clock, three):
    pulses, lost = three
    for pulse in pulses:
        pulse.beat()
    pulses[1].end()
    for _ in range(60):
        clock[0] += 5
        for pulse in (pulses[0], pulses[2]):
            pulse.beat()
            pulse.watch()
    assert lost == {}


def test_a_store_that_does_not_answer_is_on_a_host_that_is_lost(clock, three, monkeypatch):
    pulses, lost = three
    found = threading.Event()
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.001)
    pulses[0].lost = lambda silent: (lost.update({0: silent}), found.set())

    def never(key, value):
        clock[0] += SILENCE_SECONDS + 1
        assert found.wait(60)  # as long as the test goes on
        raise RuntimeError("broken pipe")

    pulses[0].store.set = never
    pulses[0].start()
    assert found.wait(60)
    assert lost == {0: [1, 2]}
