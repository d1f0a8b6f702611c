"""A step that is not finite is left out, too many stop the run, and a signal is a flag before it is a kill."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from mmgen.training.guards import FiniteGuard, Interrupt


def test_finite_values_pass_and_others_use_up_the_budget() -> None:
    guard = FiniteGuard(budget=2)
    one = torch.tensor(1.0)
    assert guard.passes(1, loss=one, grad_norm=one) and guard.skipped == 0
    assert not guard.passes(2, loss=one, grad_norm=torch.tensor(float("inf")))
    assert not guard.passes(3, loss=torch.tensor(float("nan")), grad_norm=one)
    assert guard.passes(4, loss=one, grad_norm=one)
    guard.check("file")
    assert not guard.passes(5, loss=torch.tensor(float("nan")), grad_norm=one)
    with pytest.raises(FloatingPointError) as caught:
        guard.check("file")
    text = str(caught.value)
    assert "step 5: loss not finite (loss nan, grad_norm 1)" in text and "3 steps failed so, 2 may" in text
    assert "Its batch is file" in text
    assert "\n" not in text


def test_a_resumed_run_does_not_get_a_new_budget() -> None:
    guard = FiniteGuard(budget=2, skipped=2)
    guard.check("")
    assert not guard.passes(9, loss=torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError):
        guard.check("")


def test_the_first_signal_sets_a_flag_and_the_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in Interrupt.SIGNALS}
    for number in Interrupt.SIGNALS:
        with Interrupt() as interrupt:
            assert not interrupt.requested()
            os.kill(os.getpid(), number)
            assert interrupt.requested() and interrupt.received == number
        assert {n: signal.getsignal(n) for n in Interrupt.SIGNALS} == before


@pytest.mark.slow
def test_the_second_signal_acts_at_once() -> None:
    # Python's own handler, whatever the tests were started with: in the background SIGINT may be ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    program = """
        import os, signal
        from mmgen.training.guards import Interrupt
        with Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("not here", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGTERM and process.stdout == "still here\n"


def test_outside_the_main_thread_it_is_a_flag_that_is_never_set() -> None:
    seen: list[bool] = []

    def enter() -> None:
        with Interrupt() as interrupt:
            seen.append(interrupt.requested())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
