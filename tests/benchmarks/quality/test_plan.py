"""The plan searches learning rates beyond a best edge, then runs all methods with one seed at a time."""

from benchmarks.quality.families import MEASURED
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import Run, Selection, chosen_rate, forecast, missing_runs, rates_to_try

LORA, RATES = METHODS["lora"], METHODS["lora"].rates
SELECTION = Selection(["math"], ["lora", "lora_equal_time"], ["rates", "seeds"], [1, 2])


def _line(run, validation=None):
    return vars(run) | {"validation": validation}


def _rate_lines(losses):
    return [_line(Run("math", "rates", "lora", rate, 0), loss) for rate, loss in losses.items()]


def _untrained_lines():
    return [_line(Run(family, "untrained", "untrained", None, 0)) for family in MEASURED]


def test_search_goes_on_until_the_best_rate_is_inside():
    low, middle, high = RATES
    assert rates_to_try([], "math", LORA) == [middle, low, high]
    losses = {middle: 2.0, low: 2.1, high: 1.9}
    assert set(rates_to_try(_rate_lines(losses), "math", LORA)) == {*RATES, 2 * high}
    assert chosen_rate(_rate_lines(losses), "math", LORA) is None
    losses[2 * high] = None  # diverged
    assert set(rates_to_try(_rate_lines(losses), "math", LORA)) == set(losses)
    assert chosen_rate(_rate_lines(losses), "math", LORA) == high
    assert set(rates_to_try(_rate_lines({low: 1.0, middle: 2.0, high: 3.0}), "math", LORA)) == {
        *RATES,
        low / 2,
    }
    assert chosen_rate(_rate_lines(losses), "math", METHODS["lora_equal_time"]) == high


def test_runs_in_order_and_each_once():
    low, middle, high = RATES
    first = missing_runs([], SELECTION)
    assert [run.stage for run in first] == ["untrained"] * len(MEASURED) + ["rates"] * 3
    assert [(run.method, run.lr) for run in first[-3:]] == [("lora", middle), ("lora", low), ("lora", high)]
    lines = _untrained_lines() + _rate_lines({middle: 1.0, low: 2.0})
    assert [run.lr for run in missing_runs(lines, SELECTION)] == [high]
    assert [run.lr for run in forecast(lines, SELECTION)] == [high, None, None, None, None]
    lines += _rate_lines({high: 3.0})
    tested = missing_runs(lines, SELECTION)
    expected = [("lora", 1), ("lora_equal_time", 1), ("lora", 2), ("lora_equal_time", 2)]
    assert [(run.method, run.seed) for run in tested] == expected
    assert {run.lr for run in tested} == {middle}
    assert missing_runs([*lines, *map(_line, tested)], SELECTION) == []


def test_two_ways_to_compute_are_compared_on_one_family():
    planned = {run.family for run in forecast([], Selection(methods=["hira_bf16"])) if run.stage == "seeds"}
    assert planned == {"commonsense"}
