"""A lock that is handed on in the order of asking."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from latentmem.models.turns import InTurn


def test_threads_get_it_in_the_order_of_asking_even_if_its_holder_wants_it_back() -> None:
    lock, order = InTurn(), []

    def use(name: int) -> None:
        with lock, lock:
            order.append(name)

    with ThreadPoolExecutor(6) as pool:
        with lock:
            asked = []
            for name in range(5):
                asked.append(pool.submit(use, name))
                while len(lock._waiting) <= name:
                    pass
        with lock:
            order.append(99)
        for one in asked:
            one.result(60)
    assert order == [0, 1, 2, 3, 4, 99]


def test_one_thread_at_a_time_holds_it_whatever_fails_inside() -> None:
    lock, inside, most = InTurn(), [], []

    def use() -> None:
        for _ in range(300):
            try:
                with lock:
                    inside.append(threading.get_ident())
                    most.append(len(inside))
                    inside.pop()
                    raise KeyError
            except KeyError:
                pass

    with ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(use) for _ in range(8)]:
            asked.result(60)
    assert most == [1] * 2400


def test_who_gives_up_waiting_leaves_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = InTurn()

    class Gate:
        tried = 0

        def acquire(self) -> None:
            self.tried += 1
            if self.tried == 2:
                raise KeyboardInterrupt

        def release(self) -> None:
            raise AssertionError("nobody waits at this gate any more")

    def wait() -> None:
        monkeypatch.setattr(threading, "Lock", Gate)
        try:
            with lock:
                raise AssertionError
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.undo()

    with lock:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    with lock:
        assert not lock._waiting
