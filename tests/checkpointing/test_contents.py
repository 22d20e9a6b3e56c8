"""What a checkpoint says about its run is read without unpickling foreign classes."""

import builtins
import copy
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer

from gatera_lightning.callbacks.rng_state import RNGState
from gatera_lightning.checkpointing.contents import check_entries, read_contents
from gatera_lightning.checkpointing.integrity import find_corruption
from gatera_lightning.errors import CheckpointError

ADAPTER = {
    "state_dict": {"a": torch.zeros(2)},
    "adapter": {
        **{"update": "hira", "rank": 4, "alpha": None, "dropout": 0.0, "layers": None},
        **{"target_modules": ["q_proj"], "exclude_modules": [], "rank_pattern": {"q_proj": 2}},
        "gate": {"kind": "token", "bias": 0.0},
    },
    "backbone": {"id": "a", "revision": None, "fingerprint": "b", "fingerprint_float16": "c"},
}
COUNTS = {"ready": 3, "completed": 3}
PROGRESS = {"total": COUNTS, "current": COUNTS}
FIT_LOOP = {
    "epoch_progress": PROGRESS,
    "epoch_loop.batch_progress": PROGRESS,
    "epoch_loop.scheduler_progress": dict(PROGRESS),
    "epoch_loop.state_dict": {"_batches_that_stepped": 3},
}
POSITION = {"epoch": 0, "steps": 3, "micro_batches": 0, "accumulate": 1, "plan": "ea42"}
BEST = {
    "best_k_models": {"best": torch.tensor(0.5)},
    "best_model_score": torch.tensor(0.5),
    "best_model_path": "best.ckpt",
    "kth_best_model_path": "best.ckpt",
    "kth_value": torch.tensor(0.5),
    "last_model_path": "last.ckpt",
    "dirpath": None,
}
CALLBACKS = {
    "RNGState": RNGState().state_dict(),
    "GateHistogram": {
        **{"logged_step": 2, "names": ["q", "k"]},
        **{"bins": torch.ones(2, 2, 50, dtype=torch.long), "sums": torch.ones(3, 2, 2)},
        "history": {
            **{"layers": [0], "steps": [1, 2, 3], "shares": torch.ones(3, 2, 2, 1)},
            **{"every": 1, "readings": 3},
        },
    },
    "TensorBoardOverview": {"written": ["logs"]},
    "EarlyStopping": EarlyStopping("val/loss").state_dict(),
    "Timer": Timer(duration={"days": 1}).state_dict(),
}
MOMENTS = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
RESUMES = {
    "global_step": 3,
    "loops": {"fit_loop": FIT_LOOP | {"state_dict": {"combined_loader": [dict(POSITION)]}}},
    "callbacks": CALLBACKS | {"Best": BEST},
    "optimizer_states": [{"state": {0: MOMENTS}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    "lr_schedulers": [{"last_epoch": 3, "base_lrs": [0.1]}],
}


def test_file_and_sharded_checkpoint_are_read(checkpoint_file, sharded_checkpoint):
    assert read_contents(checkpoint_file)["global_step"] == 7
    assert read_contents(sharded_checkpoint)["global_step"] == 7


def test_sharded_checkpoint_with_a_missing_part_is_rejected(sharded_copy):
    next(sharded_copy.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: the checkpoint is corrupt \(.* is missing\)"):
        read_contents(sharded_copy)


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])
def test_unreadable_checkpoint_is_rejected(checkpoint_file, sharded_checkpoint, monkeypatch, sharded):
    """A root user may read everything, so the refusal of the system is simulated."""
    real = builtins.open

    def refuse(path, *args, **options):
        if isinstance(path, str | Path) and Path(path).suffix in (".ckpt", ".distcp", ".pt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", refuse)
    problem = find_corruption(sharded_checkpoint if sharded else checkpoint_file)
    assert problem.startswith("it cannot be read (")
    assert problem.endswith("Permission denied)")


@pytest.mark.parametrize("name", ADAPTER)
def test_checkpoint_without_an_adapter_is_rejected(name):
    check_entries(ADAPTER, "last.ckpt")
    with pytest.raises(CheckpointError, match=rf"last\.ckpt: .* it lacks {name}$"):
        check_entries(ADAPTER | {name: None}, "last.ckpt")


WRONG = {
    "global_step": [-5, 2.5, True, "3"],
    "epoch": [-1],
    "skipped_steps": [-1, "0"],
    "state_dict": ["text", 2.5],
    "adapter": ["text"],
    "backbone": [[1]],
    "state_dict.a": ["text", None, [1.0]],
    "adapter.update": [3, None],
    "adapter.rank": ["x", 0, True, 2.5],
    "adapter.alpha": ["x", True],
    "adapter.dropout": [None, "0"],
    "adapter.target_modules": [3, [3]],
    "adapter.exclude_modules": ["q_proj"],
    "adapter.layers": [3, ["0"]],
    "adapter.rank_pattern": [[1]],
    "adapter.rank_pattern.q_proj": ["2"],
    "adapter.gate": [3, ["token"]],
    "adapter.gate.kind": [3, None],
    "adapter.gate.bias": ["0"],
    "backbone.id": [3],
    "backbone.fingerprint": [3, None, ["b"]],
    "backbone.fingerprint_float16": [3],
    "loops": [[1], 3],
    "callbacks": ["text"],
    "optimizer_states": ["text", [1], {}],
    "lr_schedulers": [3, ["text"]],
    "run_settings": [[1], "text"],
    "hyper_parameters": [[1]],
    "datamodule_hyper_parameters": ["text"],
    "template": [3],
    "loops.fit_loop": [[1], None],
    "loops.fit_loop.epoch_progress": [3, None],
    "loops.fit_loop.epoch_progress.total": [3],
    "loops.fit_loop.epoch_progress.total.completed": [-1, "3"],
    "loops.fit_loop.epoch_loop.batch_progress": ["text"],
    "loops.fit_loop.epoch_loop.state_dict": [3],
    "loops.fit_loop.epoch_loop.state_dict._batches_that_stepped": ["x", -1],
    "loops.fit_loop.epoch_loop.scheduler_progress": [3, "x"],
    "loops.fit_loop.epoch_loop.scheduler_progress.current": [3],
    "loops.fit_loop.state_dict": ["text"],
    "loops.fit_loop.state_dict.combined_loader": [["x"], {}],
    "loops.fit_loop.state_dict.combined_loader[0].steps": [-1, "3"],
    "callbacks.RNGState": [[1]],
    "callbacks.RNGState.ranks": [None, "text", {}, [1]],
    "callbacks.RNGState.ranks[0].torch": [None, "text", torch.zeros(5056), torch.zeros(9, dtype=torch.uint8)],
    "callbacks.RNGState.ranks[0].numpy": [
        None,
        ("MT19937", torch.ones(3, dtype=torch.long), 0, 0, 0.0),
        ("PCG64", torch.ones(624, dtype=torch.long), 0, 0, 0.0),
        ("MT19937", torch.ones(624, dtype=torch.long), 625, 0, 0.0),
    ],
    "callbacks.RNGState.ranks[0].python": [None, (3, (1,) * 9, None), (3, ("x",) * 625, None)],
    "callbacks.RNGState.ranks[0].cuda": ["text", torch.zeros(16)],
    "callbacks.GateHistogram.logged_step": ["3", -1],
    "callbacks.GateHistogram.names": [None, ["q", 3], "qk"],
    "callbacks.GateHistogram.bins": [None, torch.ones(2, 3, 50, dtype=torch.long), torch.ones(2, 2, 50)],
    "callbacks.GateHistogram.sums": ["text", torch.ones(3, 2, 1), torch.full((3, 2, 2), torch.nan)],
    "callbacks.GateHistogram.history": [[1]],
    "callbacks.GateHistogram.history.layers": [None, ["0"]],
    "callbacks.GateHistogram.history.steps": [3],
    "callbacks.GateHistogram.history.shares": [[1.0], torch.ones(2, 2, 2, 1)],
    "callbacks.GateHistogram.history.every": [0],
    "callbacks.GateHistogram.history.readings": [None],
    "callbacks.TensorBoardOverview.written": [3, [3]],
    "callbacks.EarlyStopping.wait_count": ["text", None],
    "callbacks.EarlyStopping.best_score": [torch.zeros(2)],
    "callbacks.EarlyStopping.stopping_reason": [9],
    "callbacks.Timer.time_elapsed": ["text", 3],
    "callbacks.Timer.time_elapsed.train": ["text"],
    "callbacks.Best.best_k_models": [[1], "text"],
    "callbacks.Best.best_k_models.best": ["text", torch.zeros(2)],
    "callbacks.Best.best_model_path": [3, None],
    "callbacks.Best.best_model_score": ["text"],
    "callbacks.Best.kth_value": ["text"],
    "callbacks.Best.last_model_path": [3],
    "optimizer_states[0].state[0]": [3, [1]],
    "optimizer_states[0].state[0].exp_avg": ["x", None, torch.zeros(2, dtype=torch.int64)],
    "optimizer_states[0].state[0].exp_avg_sq": [1.0],
    "optimizer_states[0].state[0].step": ["3", torch.zeros(2)],
    "optimizer_states[0].param_groups[0].params": [3, None, [0.5]],
    "optimizer_states[0].state": ["text", None],
    "optimizer_states[0].param_groups": [{}, ["text"], None],
    "lr_schedulers[0].last_epoch": [-3, 2.5],
    "lr_schedulers[0].base_lrs": [0.1, ["text"]],
    "Rows.train_position": [3, None],
    "Rows.train_position.epoch": [-1, 0.5, None],
    "Rows.train_position.accumulate": [0],
    "Rows.train_position.plan": [3],
    "Rows.examples": [3],
    "Rows.examples.train": [3],
    "Rows.choice": [3],
    "Rows.choice.train": [3],
}


ROWS = {"train_position": POSITION, "examples": {"train": "ab12"}, "choice": {"train": "cd34"}}


@pytest.mark.parametrize(
    ("place", "value"), [(place, value) for place, values in WRONG.items() for value in values], ids=str
)
def test_entry_of_another_type_or_range_is_named(place, value):
    contents = copy.deepcopy(ADAPTER | RESUMES | {"Rows": ROWS})
    check_entries(contents, "last.ckpt", resumes=True)
    keys = re.findall(r"epoch_loop\.\w+|\w+", place)
    owner = contents
    for key in keys[:-1]:
        owner = owner[int(key) if key.isdigit() else key]
    owner[int(keys[-1]) if keys[-1].isdigit() else keys[-1]] = value
    message = (
        rf"^last\.ckpt: the checkpoint is corrupt: its entry {re.escape(place)} is .*; accepted: (an? |text)"
    )
    with pytest.raises(CheckpointError, match=message):
        check_entries(contents, "last.ckpt", resumes=True)


@pytest.mark.parametrize("name", RESUMES)
def test_resuming_needs_every_state(name):
    contents = ADAPTER | RESUMES
    check_entries(contents, "last.ckpt", resumes=True)
    del contents[name]
    check_entries(contents, "last.ckpt")
    with pytest.raises(CheckpointError, match=f"cannot resume a run; it lacks {name}"):
        check_entries(contents, "last.ckpt", resumes=True)


def test_backbone_entry_must_be_complete():
    with pytest.raises(CheckpointError, match=r"its entry backbone lacks revision, fingerprint$"):
        check_entries(ADAPTER | {"backbone": {"id": "a"}}, "last.ckpt")


@pytest.mark.parametrize("content", [[1], torch.ones(2), "text", None])
def test_file_that_holds_no_entries_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_contents(tmp_path / "other.ckpt")
