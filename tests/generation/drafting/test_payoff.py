"""Drafts are turned off if they do not pay, and the answer stays the same."""

import pytest

from gatera_lightning.generation.drafting.payoff import Payoff


class Clock:
    """A clock that shows what a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


def run(passes, plain_seconds=1.0, drafted_seconds=1.8, tokens=2, slow_first=False):
    """Return the payoff after passes of these lengths; drafts are made when it allows them."""
    clock = Clock()
    payoff, drafted = Payoff(clock), []
    for number in range(passes):
        payoff.start()
        drafted.append(payoff.allows_drafts)
        slow = 50 if slow_first and number in (0, 9) else 0
        clock.now += slow + (drafted_seconds if drafted[-1] else plain_seconds)
        payoff.stop(tokens if drafted[-1] else 1, drafted=drafted[-1])
    return payoff, drafted


def test_drafts_that_pay_stay_on():
    payoff, drafted = run(200)
    assert payoff.verdict is None
    assert drafted == [False] * 4 + [True] * 196


def test_drafts_that_do_not_pay_are_turned_off_for_good():
    payoff, drafted = run(200, drafted_seconds=2.1)
    assert drafted == [False] * 4 + [True] * 24 + [False] * 172
    assert payoff.verdict == (
        "drafts turned off: a forward pass with drafts gave 2.00 tokens, and took 2.10 times as long as one "
        "without"
    )


@pytest.mark.parametrize(("seconds", "is_on"), [(1.8, True), (2.1, False)])
def test_a_slow_pass_does_not_decide(seconds, is_on):
    payoff, _ = run(40, drafted_seconds=seconds, slow_first=True)
    assert (payoff.verdict is None) == is_on
