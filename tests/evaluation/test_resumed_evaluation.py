"""Resuming an evaluation: interrupted after any batch, it ends with the file of an uninterrupted one."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from evaluations import BOTH, EXAMPLES, Killed, evaluate, merged_bytes, perturbed_module
from tiny_backbone import run_program, tiny_args

from gatera_lightning import ConfigError, save_adapter
from gatera_lightning.cli.main import main
from gatera_lightning.evaluation.prediction_files import PREDICTIONS_FILE, read_records

EVERYTHING = [(kind, example) for kind in BOTH for example in range(EXAMPLES)]


@pytest.fixture(scope="module")
def module(tiny_backbone):
    return perturbed_module(tiny_backbone)


@pytest.fixture(scope="module")
def complete(module, tmp_path_factory):
    """The folder of an uninterrupted run, and what the run computed."""
    folder = tmp_path_factory.mktemp("complete")
    return folder, evaluate(module, folder)


def test_evaluation_writes_one_line_per_example(complete):
    folder, killer = complete
    assert sorted(killer.computed) == sorted(EVERYTHING)
    assert killer.batches > 5
    examples = [json.loads(line) for line in merged_bytes(folder).splitlines()]
    assert [example["example"] for example in examples] == list(range(EXAMPLES))
    for example in examples:
        assert list(example) == ["task", "example", "key", "gold", "likelihood", "generation"]
        assert (example["task"], len(example["key"])) == ("everyday", 16)
        assert list(example["likelihood"]) == ["log_likelihoods", "tokens", "characters", "choice"]
        assert list(example["likelihood"]["choice"]) == ["sum", "per_token", "per_character"]
        assert list(example["generation"]) == ["text", "answer", "choice"]
    assert (
        len({example["generation"]["text"] for example in examples}) > 3
    )  # otherwise a mix-up would not show
    assert len({example["key"] for example in examples}) == EXAMPLES


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_complete_evaluation_computes_nothing_again(complete, module, tmp_path, stage):
    folder = shutil.copytree(complete[0], tmp_path / "again")
    forwards = []
    handle = module.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    killer = evaluate(module, folder, stage=stage)
    handle.remove()
    assert killer.computed == []
    assert (
        len(forwards) <= 2 * 4
    )  # a dummy example keeps Lightning's loop going: 1 forward pass, 4 new tokens
    assert merged_bytes(folder) == merged_bytes(complete[0])


@pytest.mark.parametrize("cut", ["", '[["likelihood", 3, {"log_like'], ids=["between lines", "within line"])
def test_evaluation_killed_after_any_batch_resumes(complete, module, tmp_path, cut):
    for after in range(complete[1].batches + 1):
        folder = tmp_path / str(after)
        with pytest.raises(Killed):
            evaluate(module, folder, after)
        (part,) = folder.glob("part-*")
        with part.open("a") as file:
            file.write(cut)
        on_disk = set(read_records(folder))
        killer = evaluate(module, folder)
        assert len(killer.computed) == len(EVERYTHING) - len(on_disk)
        assert set(killer.computed) | on_disk == set(EVERYTHING)
        assert merged_bytes(folder) == merged_bytes(complete[0])


def test_evaluation_killed_after_every_batch_resumes(complete, module, tmp_path):
    for _ in range(complete[1].batches):
        with pytest.raises(Killed):
            evaluate(module, tmp_path, after=1)
    assert len(list(tmp_path.glob("part-*"))) == complete[1].batches
    assert evaluate(module, tmp_path).computed == []
    assert merged_bytes(tmp_path) == merged_bytes(complete[0])


@pytest.mark.parametrize("first", [0, 1])
def test_resumed_evaluation_keeps_composition_of_batches(complete, module, tmp_path, first):
    """One of two ranks may be ahead when both are killed. Other batches would round differently."""
    with pytest.raises(Killed):
        evaluate(module, tmp_path, after=complete[1].batches)
    (part,) = tmp_path.glob("part-*")
    lines = part.read_text().splitlines(keepends=True)
    part.unlink()
    (tmp_path / "part-1-0.jsonl").write_text("".join(lines[first::2]))
    killer = evaluate(module, tmp_path)
    assert killer.batches == len(lines) - len(lines[first::2])
    assert merged_bytes(tmp_path) == merged_bytes(complete[0])


def test_evaluation_with_merged_file_and_parts_resumes(complete, module, tmp_path):
    with pytest.raises(Killed):
        evaluate(module, tmp_path, after=complete[1].batches)
    shutil.copy(complete[0] / PREDICTIONS_FILE, tmp_path)
    assert evaluate(module, tmp_path).computed == []
    assert merged_bytes(tmp_path) == merged_bytes(complete[0])


def test_evaluation_adds_other_kind(complete, module, tmp_path):
    evaluate(module, tmp_path, evaluate_by=["likelihood"])
    assert all("generation" not in json.loads(line) for line in merged_bytes(tmp_path).splitlines())
    killer = evaluate(module, tmp_path)
    assert sorted(killer.computed) == [("generation", example) for example in range(EXAMPLES)]
    assert merged_bytes(tmp_path) == merged_bytes(complete[0])
    evaluate(module, tmp_path, evaluate_by=["likelihood"])
    assert merged_bytes(tmp_path) == merged_bytes(complete[0])  # earlier predictions stay


def test_evaluation_without_folder_restarts_in_log_folder(complete, module, tmp_path):
    evaluate(module, None, root=tmp_path)
    assert merged_bytes(tmp_path) == merged_bytes(complete[0])
    with pytest.raises(Killed):
        evaluate(module, None, after=2, root=tmp_path)
    killer = evaluate(module, None, root=tmp_path, examples=4)
    assert sorted(killer.computed) == [(kind, example) for kind in sorted(BOTH) for example in range(4)]
    assert len(merged_bytes(tmp_path).splitlines()) == 4


def test_evaluation_rejects_corrupt_predictions(complete, module, tmp_path):
    folder = shutil.copytree(complete[0], tmp_path / "folder")
    lines = merged_bytes(folder).splitlines(keepends=True)
    (folder / PREDICTIONS_FILE).write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"predictions\.jsonl, line 3: corrupt"):
        evaluate(module, folder, after=0)


@pytest.fixture
def evaluation_args(tiny_backbone, tmp_path, monkeypatch):
    """A command that tests 48 questions by likelihood and by generation."""
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(perturbed_module(tiny_backbone).model, tmp_path / "adapter")
    return [
        *("test", "--config", "quickstart.yaml", *tiny_args(tiny_backbone)),
        *("--model.warm_start", str(adapter)),
        *("--data.init_args.test", '["everyday[:48]"]', "--data.init_args.eval_batch_size", "4"),
        *("--data.init_args.evaluate_by", "[likelihood, generation]", "--model.decoding.beams", "4"),
    ]


def run_and_kill(args, folder, size):
    """Start a command, and kill it when a file of predictions is larger than ``size`` bytes."""
    command = [sys.executable, "-m", "gatera_lightning", *args, "--evaluation.folder", str(folder)]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **options) as program:
        deadline = time.monotonic() + 120
        try:
            while program.poll() is None and time.monotonic() < deadline:
                if any(path.stat().st_size > size for path in folder.glob("part-*")):
                    break
                time.sleep(0.002)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_program_resumes_on_any_number_of_ranks(evaluation_args, tmp_path):
    assert main([*evaluation_args, "--evaluation.folder", "complete"]) == 0
    run_and_kill(evaluation_args, tmp_path / "killed", size=8_000)
    assert 0 < len(read_records(tmp_path / "killed")) < 2 * 48
    shutil.copytree("killed", "killed_2")
    assert main([*evaluation_args, "--evaluation.folder", "killed"]) == 0
    two_ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    run_program(*evaluation_args, "--evaluation.folder", "killed_2", *two_ranks, cwd=tmp_path, timeout=300)
    for name in ("killed", "killed_2"):
        assert merged_bytes(tmp_path / name) == merged_bytes(tmp_path / "complete")
        summary = json.loads((tmp_path / name / "test_results.json").read_text())
        assert 0 < summary["resumed_predictions"] < 2 * 48


@pytest.mark.slow
@pytest.mark.stress
def test_program_killed_at_random_resumes(evaluation_args, tmp_path):
    assert main([*evaluation_args, "--evaluation.folder", "complete"]) == 0
    draw = random.Random(0)
    for number in range(int(os.environ.get("GATERA_KILLS", "3")) // 3):
        folder = tmp_path / f"killed_{number}"
        run_and_kill(evaluation_args, folder, size=draw.randint(0, 12_000))
        assert main([*evaluation_args, "--evaluation.folder", folder.name]) == 0
        assert merged_bytes(folder) == merged_bytes(tmp_path / "complete")
