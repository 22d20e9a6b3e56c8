"""Going on: from the newest sound checkpoint, in the same folder, past a step that was left out, with the same histograms."""

import contextlib
import shutil
from pathlib import Path

import fit_script
import pytest
import torch
from fit_script import Job, run
from power_cut import ADAPTER, cut_off
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import run_program, tiny_args

from gatera_lightning import GateRAModule, NonFiniteLossError, adapter_parameters
from gatera_lightning.checkpointing.resume import recount_batches
from gatera_lightning.cli.main import main

# --- the command line ---


@pytest.fixture(scope="module")
def args(tiny_backbone):
    """Two epochs of three steps, with dropout, saved after each step; a histogram after every second."""
    return [
        *("fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), "--trainer.max_steps", "-1"),
        *("--model.adapter.dropout", "0.2", "--checkpoint.every_n_steps", "1", "--checkpoint.keep_last", "3"),
        *("--gate_histogram.every_n_steps", "2", "--checkpoint.monitor", "null"),
    ]


@pytest.fixture(scope="module")
def runs(args, tmp_path_factory):
    """The folders of an uninterrupted run, and of one that ended after four steps."""
    root = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(root):
        assert main(args) == 0
        cut_off(args, 4)
    return [root / "runs" / "quickstart" / f"version_{number}" for number in (0, 1)]


@pytest.fixture
def whole(runs):
    return runs[0]


@pytest.fixture
def cut(runs, tmp_path, monkeypatch):
    """The checkpoints of the run that ended early, one's own, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(runs[1] / "checkpoints", "saved"))
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}
    assert steps == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resumed_of(folder="runs/quickstart/version_0"):
    return Path(folder, ADAPTER).read_bytes()


def test_a_folder_goes_on_from_its_newest(args, whole, cut, caplog):
    assert main([*args, "--ckpt_path", "saved"]) == 0
    assert "skipping" not in caplog.text
    assert resumed_of() == (whole / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    "damaged", [["last.ckpt"], ["last.ckpt", "last-1.ckpt"]], ids=["newest", "newest two"]
)
def test_a_folder_goes_on_from_the_one_before_what_is_damaged(args, whole, cut, caplog, damaged):
    for name in damaged:
        flip(cut / name)
    with caplog.at_level("INFO", "gatera_lightning"):
        assert main([*args, "--ckpt_path", "saved"]) == 0
    said = [
        record.getMessage()
        for record in caplog.records
        if record.name == "gatera_lightning.checkpointing.checkpoint_io"
    ]
    skipped = sorted(text.partition(": it is damaged (record ")[0] for text in said[:-1])
    assert skipped == sorted(f"skipping the checkpoint saved/{name}" for name in damaged)
    assert said[-1] == f"continuing from saved/last-{len(damaged)}.ckpt, at optimizer step {4 - len(damaged)}"
    assert resumed_of() == (whole / ADAPTER).read_bytes()


@pytest.mark.parametrize("epochs", [2, 5])
@pytest.mark.parametrize("name", ["last.ckpt", "last-1.ckpt"], ids=["in an epoch", "at its end"])
def test_a_run_whose_end_is_a_number_of_steps(args, whole, cut, name, epochs):
    """Lightning by itself counts an epoch twice, and ends at max_epochs one epoch early."""
    ends = ["--trainer.max_steps", "6", "--trainer.max_epochs", str(epochs)]
    assert main([*args, *ends, "--ckpt_path", f"saved/{name}"]) == 0
    last = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert (last["global_step"], last["epoch"]) == (6, 1)
    assert resumed_of() == (whole / ADAPTER).read_bytes()


@pytest.mark.slow
def test_the_program_says_what_it_skips(args, whole, cut):
    flip(cut / "last.ckpt")
    output = run_program(*args, "--ckpt_path", "saved", cwd=Path.cwd())
    assert "skipping the checkpoint saved/last.ckpt: it is damaged (record " in output
    assert "Restoring states from the checkpoint path at saved/last-1.ckpt" in output
    assert resumed_of() == (whole / ADAPTER).read_bytes()


def test_a_folder_in_which_all_is_damaged(args, cut, capsys):
    for path in cut.glob("*.ckpt"):
        flip(path)
    assert main([*args, "--ckpt_path", "saved"]) == 1
    assert (
        "saved: every checkpoint is damaged: last-1.ckpt, last-2.ckpt, last.ckpt" in capsys.readouterr().err
    )


def test_a_damaged_file_is_no_start(args, cut, capsys):
    flip(cut / "last.ckpt")
    assert main([*args, "--ckpt_path", "saved/last.ckpt"]) == 1
    assert "python -m gatera_lightning: saved/last.ckpt: it is damaged (record " in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_a_configuration_problem(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/last.ckpt.draft").write_text("half a checkpoint")
    assert main([*args, "--ckpt_path", "empty"]) == 2
    assert "ckpt_path: the folder 'empty' holds no checkpoint (*.ckpt); accepted: " in capsys.readouterr().err
    assert not Path("runs").exists()


def test_last_begins_and_goes_on_in_the_same_folder(args, whole, tmp_path, monkeypatch, caplog):
    """One command, as in a job that is queued again."""
    monkeypatch.chdir(tmp_path)
    command = [*args, "--ckpt_path", "last", "--trainer.logger.init_args.version", "job"]
    caplog.set_level("INFO", "gatera_lightning")
    cut_off(command, 4)
    assert "no checkpoint in runs/quickstart/job/checkpoints yet: the run begins" in caplog.text
    caplog.clear()
    assert main(command) == 0
    assert "continuing from runs/quickstart/job/checkpoints/last.ckpt, at optimizer step 4" in caplog.text
    assert [path.name for path in Path("runs/quickstart").iterdir()] == ["job"]
    assert resumed_of("runs/quickstart/job") == (whole / ADAPTER).read_bytes()
    assert main(command) == 0  # there is nothing left to do
    assert resumed_of("runs/quickstart/job") == (whole / ADAPTER).read_bytes()


def gates(folder):
    """``{step: {name: what TensorBoard holds}}`` of all that the gate histograms wrote."""
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "images": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["histograms"]:
        for event in events.Histograms(name):
            found.setdefault(event.step, {})[name] = event.histogram_value
    for event in events.Images("gate_shares/layers"):
        found.setdefault(event.step, {})["gate_shares/layers"] = event.encoded_image_string
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name) if name.startswith("gate") else ():
            found.setdefault(event.step, {})[name] = event.value
    return found


def test_a_resumed_run_has_the_histograms_of_the_whole_one(args, whole, cut):
    """Of three steps, that is between two histograms: what the third added comes from the checkpoint."""
    saved = torch.load(cut / "last-1.ckpt", weights_only=True)["callbacks"]["GateHistogram"]
    assert saved["logged_step"] == 2
    assert saved["bins"].sum() > 0
    assert main([*args, "--ckpt_path", "saved/last-1.ckpt"]) == 0
    expected, found = gates(whole), gates(Path("runs/quickstart/version_0"))
    assert (set(expected), set(found)) == ({2, 4, 6}, {4, 6})
    groups, modules = 1 + 5 + 2, 10  # all modules, families, layers; each module
    assert (
        len(found[4]) == (groups + modules) * 2 + groups * 2 * 4 + 1
    )  # histograms, scalars, and the shares from step 2 on
    assert {step: expected[step] for step in found} == found


def test_of_a_step_with_a_histogram_nothing_is_counted_twice(cut):
    """Written at step 4, the counts begin anew."""
    state = torch.load(cut / "last.ckpt", weights_only=True)["callbacks"]["GateHistogram"]
    assert state.keys() == {"logged_step", "history"}
    assert state["logged_step"] == 4
    assert state["history"]["steps"] == [2, 4]


# --- other micro-batches ---


def checkpoint_of(accumulate, total, current):
    def counts(ready, completed):
        return {"ready": ready, "started": ready, "processed": ready, "completed": completed}

    return {
        "global_step": 5,
        "Rows": {"train_position": {"accumulate": accumulate, "step": 3}},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": {
            "total": counts(*total), "current": counts(*current), "is_last_batch": False
        }}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "total", "current", "accumulate", "new_total", "new_current"),
    [
        (2, (10, 10), (6, 6), 1, (5, 5), (3, 3)),
        (2, (10, 9), (6, 5), 4, (20, 19), (12, 11)),
        (1, (5, 5), (3, 3), 8, (40, 40), (24, 24)),
        (4, (20, 19), (0, 0), 2, (10, 9), (0, 0)),
        (2, (10, 9), (6, 5), 2, (10, 9), (6, 5)),
    ],
    ids=["fewer", "more, one open", "many", "at the start of an epoch", "as many"],
)
def test_batches_are_recounted(before, total, current, accumulate, new_total, new_current):
    checkpoint = checkpoint_of(before, total, current)
    recount_batches(checkpoint, accumulate)
    assert checkpoint == checkpoint_of(before, new_total, new_current)


def test_a_checkpoint_without_a_position_is_left_alone():
    checkpoint = checkpoint_of(2, (10, 10), (6, 6))
    del checkpoint["Rows"]
    recount_batches(checkpoint, 4)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["total"] == {"ready": 10, "started": 10, "processed": 10, "completed": 10}
    assert checkpoint["global_step"] == 5


# --- a step left out ---


class Recording(fit_script.Watch):
    """After every step: the parameters, AdamW's state, the learning rate, and what is logged."""

    def __init__(self, job):
        super().__init__(job)
        self.parameters, self.moments, self.rates, self.logged = [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        self.rates.append(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])
        self.parameters.append([p.detach().clone() for p in adapter_parameters(module.model).values()])
        self.moments.append([value.clone() for state in optimizer.state.values() for value in state.values()])
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)


@pytest.fixture
def recorded(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_script, "Watch", Recording)
    return lambda **job: run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", **job))


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture
def third(recorded):
    """An uninterrupted run of four steps, and an example of its third."""
    clean = recorded()
    return clean, clean.ids[2][0]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_left_out_moves_nothing_but_the_schedule(recorded, third, tmp_path, monkeypatch, caplog, kind):
    clean, example = third

    def spoil(self, *args):
        if self.trainer.global_step == 2:
            next(iter(adapter_parameters(self.model).values())).grad[0, 0] = torch.inf

    if kind == "gradient":
        monkeypatch.setattr(GateRAModule, "on_after_backward", spoil)
    watch = recorded(skip=1, poison=example if kind == "loss" else None, save_at=[2, 3, 4], clip=1e9)
    assert same(watch.parameters[1], clean.parameters[1])
    assert same(watch.parameters[2], watch.parameters[1])
    assert same(watch.moments[2], watch.moments[1])
    assert not same(watch.parameters[3], watch.parameters[2])
    assert not same(watch.moments[3], watch.moments[2])
    assert all(torch.isfinite(tensor).all() for tensor in watch.parameters[3] + watch.moments[3])
    assert watch.rates == clean.rates  # the schedule goes on as if the step had been taken
    assert [logged.get("train/skipped_steps") for logged in watch.logged][:3] == [None, None, 1.0]
    assert (
        f"left out 1 of at most 1 steps: the loss of optimizer step 2 is {'nan' if kind == 'loss' else ''}"
        in caplog.text
    )
    saved = [torch.load(tmp_path / f"step_{step}.ckpt", weights_only=True) for step in (2, 3, 4)]
    assert [checkpoint["skipped_steps"] for checkpoint in saved] == [0, 1, 1]
    assert [checkpoint["global_step"] for checkpoint in saved] == [2, 3, 4]
    assert {int(state["step"]) for state in saved[2]["optimizer_states"][0]["state"].values()} == {3}


def test_a_resumed_run_counts_what_was_left_out_before(recorded, third, tmp_path):
    clean, example = third
    whole = recorded(skip=1, poison=example, save_at=[3])
    resumed = recorded(skip=1, resume=f"{tmp_path}/step_3.ckpt")
    assert same(resumed.parameters[-1], whole.parameters[-1])
    with pytest.raises(
        NonFiniteLossError,
        match=r"optimizer step 3 is nan .* Steps left out before: 1 of 1\. Last checkpoint: ",
    ):
        recorded(skip=1, poison=clean.ids[3][0], resume=f"{tmp_path}/step_3.ckpt")


@pytest.mark.parametrize("keep", [True, False])
def test_without_leave_to_skip_the_error_names_step_examples_and_last_checkpoint(
    recorded, third, tmp_path, keep
):
    clean, example = third
    with pytest.raises(NonFiniteLossError) as caught:
        recorded(poison=example, keep=keep)
    last = tmp_path / "checkpoints" / "last.ckpt"
    said = str(caught.value)
    assert said.startswith("the loss of optimizer step 2 is nan")
    assert (
        f"example ids of the micro-batches concerned: {sorted(clean.ids[2])}. The step was not taken" in said
    )
    assert said.endswith(
        f"Steps left out before: 0 of 0. Last checkpoint: {last if keep else 'none was written'}"
    )
    if keep:
        assert torch.load(last, weights_only=True)["global_step"] == 2
