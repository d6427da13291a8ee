"""Signals that are kept until work can end: the first behind the block, the second at once."""

import signal
import threading

import pytest

from tasks.signals import kept_signals


@pytest.fixture
def heard():
    """The signals that take effect, in order."""
    numbers = []
    kept = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: numbers.append(number)) for number in kept]
    yield numbers
    for number, handler in zip(kept, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_takes_effect_behind_the_block(heard, number):
    with kept_signals() as came:
        assert not came()
        signal.raise_signal(number)
        assert came() and heard == []
    assert heard == [number]
    signal.raise_signal(number)
    assert heard == [number, number]


def test_a_second_signal_takes_effect_at_once(heard):
    with kept_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT]
    assert heard == [signal.SIGINT, signal.SIGTERM]


def test_work_that_ends_by_an_error_gives_way_to_the_signal(heard):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), kept_signals() as came:
        signal.raise_signal(signal.SIGINT)
        if came():
            raise RuntimeError("it has ended")


def test_ignored_signals_stay_ignored_and_other_threads_keep_none(heard):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with kept_signals() as came:
        signal.raise_signal(signal.SIGINT)
        assert not came()
    found = []

    def work():
        with kept_signals() as came:
            found.append(came())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False] and heard == []
