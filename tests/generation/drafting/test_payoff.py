"""Drafts are turned off if they do not pay, and the answer stays the same."""

import pytest

from gatera_lightning.generation.drafting.payoff import Payoff


class Clock:
    """A clock that shows what a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


def run(passes, seconds=(2.0, 1.6), slow=False, prompts=1, growth=0.0):
    """Return the payoff after passes of these lengths, and which of them had drafts.

    A pass without drafts takes a second. With drafts, passes draft and verify in turn, and give a prompt four
    tokens. Each pass takes longer than the one before by ``growth``.
    """
    clock = Clock()
    payoff, drafted = Payoff(clock), []
    for number in range(passes):
        payoff.start()
        drafted.append(payoff.allows_drafts)
        verifies = number % 2
        clock.now += (seconds[verifies] if drafted[-1] else 1.0) * (1 + growth * number)
        clock.now += 50 if slow and number in (0, 9) else 0
        if drafted[-1]:
            tokens = (1, 3)[verifies] * prompts
            payoff.stop(tokens, prompts=prompts, drafts=3 * verifies, noise=3 - 3 * verifies)
        else:
            payoff.stop(prompts, prompts=prompts, drafts=0, noise=0)
    return payoff, drafted


def test_drafts_that_pay_stay_on():
    payoff, drafted = run(200)
    assert payoff.verdict is None
    # Two passes without drafts are measured before each further decision.
    assert drafted == [False] * 4 + ([True] * 24 + [False] * 2) * 7 + [True] * 14


@pytest.mark.parametrize(("seconds", "is_on"), [((2.0, 1.6), True), ((2.6, 1.6), False)])
def test_decisions_follow_texts_that_grow(seconds, is_on):
    """The last pass takes twice as long as the first one."""
    payoff, _ = run(1000, seconds, growth=0.001)
    assert (payoff.verdict is None) == is_on


def test_drafts_that_do_not_pay_are_turned_off_for_good():
    payoff, drafted = run(200, (2.6, 1.6))
    assert drafted == [False] * 4 + [True] * 24 + [False] * 172
    assert payoff.verdict == (
        "drafts turned off: a forward pass with drafts gave 2.00 tokens, and took 2.10 times as long as one "
        "without"
    )


@pytest.mark.parametrize(("prompts", "drafted_passes"), [(2, 12), (4, 6), (5, 6), (8, 6), (64, 6)])
def test_prompts_that_share_passes_decide_after_fewer(prompts, drafted_passes):
    payoff, drafted = run(100, (2.6, 1.6), prompts=prompts)
    assert drafted == [False] * 4 + [True] * drafted_passes + [False] * (96 - drafted_passes)
    assert "gave 2.00 tokens, and took 2.10 times as long" in payoff.verdict


def test_a_cycle_is_measured_whole():
    """Three prompts have 24 samples after 8 passes; here, the first pass with drafts is one that verifies."""
    payoff = Payoff(clock := Clock())
    for _ in range(4):
        payoff.start()
        clock.now += 1.0
        payoff.stop(3, prompts=3, drafts=0, noise=0)
    allowed = []
    for drafts, noise in [(3, 0), *[(0, 3), (3, 0)] * 5]:
        payoff.start()
        allowed.append(payoff.allows_drafts)
        clock.now += 3.0
        payoff.stop(3, prompts=3, drafts=drafts, noise=noise)
    assert allowed == [True] * 9 + [False] * 2


@pytest.mark.parametrize(("seconds", "is_on"), [((2.0, 1.9), True), ((2.0, 2.1), False)])
def test_a_slow_pass_does_not_decide(seconds, is_on):
    payoff, _ = run(40, seconds, slow=True)
    assert (payoff.verdict is None) == is_on
