"""Signals: the first is a wish, a later one an order, and outside the block the program is as before."""

import os
import signal

import pytest

from graf.runtime import interrupt
from graf.runtime.interrupt import STOP_SIGNALS, Stopped, StopRequest, deaf

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_answered_at_once_and_interrupts_nothing(number, capfd):
    with StopRequest(lambda: "finishing iteration 7, then saving") as request:
        assert request.reason is None
        request.leave_if_asked()
        os.kill(os.getpid(), number)
        assert request.reason == signal.Signals(number).name
        with pytest.raises(Stopped, match=request.reason):
            request.leave_if_asked()
    said = capfd.readouterr().err
    assert said == f"\n{request.reason}: finishing iteration 7, then saving; again to stop without\n"


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_a_signal_within_three_seconds_is_the_same_request_and_a_later_one_stops_at_once(second, monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 2.9
        os.kill(os.getpid(), second)
        assert request.reason == "SIGTERM"
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
    assert capfd.readouterr().err.count("again to stop") == 1


def test_a_repetition_after_the_block_is_not_heard_and_what_comes_later_is_as_before(monkeypatch, capfd):
    now, seen = [100.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 2.9
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == []
        now[0] += 0.2
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == count * [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_former_handlers_come_back(error):
    seen = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        request = StopRequest()
        if error is None:
            with request:
                pass
        else:
            with pytest.raises(error), request:
                raise error
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert request.reason is None
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_signal_that_was_ignored_before_stays_ignored():
    """As under nohup, which means it."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.reason is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_last_words_are_not_cut_short_and_afterwards_signals_are_heard_again(number):
    seen = []
    former = signal.signal(number, lambda number, frame: seen.append(number))
    try:
        with deaf():
            os.kill(os.getpid(), number)
        assert seen == []
        os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        signal.signal(number, former)
