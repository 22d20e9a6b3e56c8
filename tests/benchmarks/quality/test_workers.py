"""Workers do every missing run once, and a comparison that was stopped goes on."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.quality import __main__ as program
from benchmarks.quality import ledger, workers
from benchmarks.quality.plan import Run, Selection, missing_runs

SELECTION = Selection(["dialogue"], ["lora", "lora_equal_time"], ["rates", "seeds"], [1, 2])


@pytest.fixture
def executed(monkeypatch):
    """The runs that workers did; a rate of 0.016 is the best for LoRA."""
    done = []

    def execute(run):
        done.append(run)
        distance = None if run.lr is None else abs(math.log(run.lr / 0.016))
        return vars(run) | {"validation": distance, "cost": {"cpu_seconds": 1.0}}

    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    monkeypatch.setattr(workers, "_execute", execute)
    return done


@pytest.mark.parametrize("count", [1, 3])
def test_all_runs_are_done_once(executed, tmp_path, capsys, count):
    path = tmp_path / "ledger.jsonl"
    workers.run_missing(path, SELECTION, count)
    lines = ledger.read(path)
    assert missing_runs(lines, SELECTION) == []
    assert {line["lr"] for line in lines if line["stage"] == "rates"} == {0.002, 0.004, 0.008, 0.016, 0.032}
    assert {line["lr"] for line in lines if line["stage"] == "seeds"} == {0.016}
    assert len(executed) == len(set(executed)) == len(lines)
    assert {Run.of(line) for line in lines} == set(executed)
    assert len(capsys.readouterr().out.splitlines()) == len(lines)
    path.write_text("".join(text + "\n" for text in path.read_text().splitlines()[:-1]))
    executed.clear()
    workers.run_missing(path, SELECTION, count)
    assert [Run.of(line) for line in lines[-1:]] == executed


def test_plan_and_bad_arguments(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["benchmarks.quality", "--ledger", str(tmp_path / "new"), *arguments])
        program.main()

    call("--plan", "--family", "math", "--only", "hira", "--seeds", "1", "2")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 4 + 3 + 2 + 1  # header, untrained, rates, seeds, sum
    assert rows[-1].startswith("0.2 CPU hours")
    for bad in (["--seeds", "0"], ["--workers", "0"], ["--only", "gatera2"]):
        with pytest.raises(SystemExit) as stopped:
            call(*bad)
        assert stopped.value.code == 2
