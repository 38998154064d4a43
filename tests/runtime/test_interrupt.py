"""Signals: the first is a wish, the second an order, and outside the block the program is as before."""

import os
import signal

import pytest

from graf.runtime.interrupt import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_by_name_and_interrupts_nothing(number):
    with StopRequest() as request:
        assert request.reason is None
        os.kill(os.getpid(), number)
        assert request.reason == number.name


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(second):
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert request.reason == "SIGTERM"


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_former_handlers_come_back(error):
    seen = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        request = StopRequest()
        if error is None:
            with request:
                pass
        else:
            with pytest.raises(error), request:
                raise error
        assert signal.getsignal(signal.SIGINT) is interrupt
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert request.reason is None
    finally:
        signal.signal(signal.SIGTERM, former)
