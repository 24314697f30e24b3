"""How much a key may ask for, against a clock that the test moves."""

import threading

import pytest

from latentmem.serving.asks import Refused
from latentmem.serving.operators.keys import Key
from latentmem.serving.operators.limits import Limits


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limits(clock):
    return Limits(clock)


def key(id="k", **limits):
    return Key(id, "t", frozenset(["infer"]), 0.0, **limits)


def ask(limits, of, tokens=0):
    with limits.admitted(of):
        limits.spent(of.id, tokens)


def refusal(limits, of):
    with pytest.raises(Refused) as raised, limits.admitted(of):
        pass
    assert raised.value.status == 429
    return str(raised.value), raised.value.retry_after


def test_a_minutes_requests_pass_at_once_and_then_one_at_a_time(limits, clock):
    of = key(requests_per_minute=3)
    for _ in range(3):
        ask(limits, of)
    assert refusal(limits, of) == ("this key may send 3 requests a minute", pytest.approx(20))
    clock.now += 19.9
    assert refusal(limits, of)[1] == pytest.approx(0.1)
    clock.now += 0.1
    ask(limits, of)
    assert refusal(limits, of)[1] == pytest.approx(20)
    clock.now += 3600
    for _ in range(3):
        ask(limits, of)
    assert refusal(limits, of)[1] == pytest.approx(20)


def test_tokens_are_taken_afterwards_and_a_debt_is_waited_for(limits, clock):
    of = key(tokens_per_minute=60)
    ask(limits, of, tokens=59)
    ask(limits, of, tokens=31)
    assert refusal(limits, of) == ("this key may use 60 tokens a minute", pytest.approx(31))
    clock.now += 30.5
    ask(limits, of)


def test_requests_at_once_are_counted_until_they_end_however_they_end(limits):
    of = key(parallel=2)
    with limits.admitted(of):
        with limits.admitted(of):
            assert limits.at_once("k") == 2
            assert refusal(limits, of) == ("this key may ask for 2 answers at once", 1.0)
        with pytest.raises(RuntimeError), limits.admitted(of):
            raise RuntimeError
        with limits.admitted(of):
            pass
    assert limits.at_once("k") == 0


def test_what_is_refused_costs_nothing(limits, clock):
    of = key(parallel=1, requests_per_minute=2)
    with limits.admitted(of):
        for _ in range(5):
            refusal(limits, of)
    ask(limits, of)
    assert refusal(limits, of)[0] == "this key may send 2 requests a minute"


def test_keys_do_not_share_and_one_without_limits_is_never_refused(limits):
    ask(limits, key("a", requests_per_minute=1))
    refusal(limits, key("a", requests_per_minute=1))
    ask(limits, key("b", requests_per_minute=1))
    for _ in range(1000):
        ask(limits, key("c"), tokens=10**9)


def test_threads_take_no_more_than_there_is(limits):
    of, passed, start = key(requests_per_minute=50), [], threading.Barrier(8)

    def try_it():
        start.wait()
        for _ in range(20):
            try:
                ask(limits, of)
            except Refused:
                continue
            passed.append(1)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 50
