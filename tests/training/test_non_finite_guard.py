"""A step whose loss or gradient is not finite changes nothing but the schedule, or ends the run."""

import fit_script
import pytest
import torch
from fit_script import Job, run

from gatera_lightning import GateRAModule, NonFiniteLossError, adapter_parameters


class Recording(fit_script.Recorder):
    """Records parameters, AdamW's state, the learning rate and logged values after every step."""

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
    monkeypatch.setattr(fit_script, "Recorder", Recording)
    return lambda **job: run(Job(str(tiny_backbone), str(tmp_path), dtype="float32", **job))


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture
def clean(recorded):
    """An uninterrupted run of four steps without a NaN."""
    return recorded()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skipped_step_changes_only_the_schedule(recorded, clean, tmp_path, monkeypatch, caplog, kind):
    def spoil_gradient(self, *args):
        if self.trainer.global_step == 2:
            next(iter(adapter_parameters(self.model).values())).grad[0, 0] = torch.inf

    if kind == "gradient":
        monkeypatch.setattr(GateRAModule, "on_after_backward", spoil_gradient)
    example = clean.ids[2][0] if kind == "loss" else None
    run = recorded(skip=1, poison=example, save_at=[2, 3, 4], clip=1e9)
    assert same(run.parameters[1], clean.parameters[1])
    assert same(run.parameters[2], run.parameters[1])
    assert same(run.moments[2], run.moments[1])
    assert not same(run.parameters[3], run.parameters[2])
    assert not same(run.moments[3], run.moments[2])
    assert all(torch.isfinite(tensor).all() for tensor in run.parameters[3] + run.moments[3])
    assert run.rates == clean.rates  # the schedule continues as if the step had been taken
    assert [logged.get("train/skipped_steps") for logged in run.logged][:3] == [None, None, 1.0]
    loss = "nan" if kind == "loss" else ""
    assert f"skipped 1 of at most 1 steps: the loss of optimizer step 3 is {loss}" in caplog.text
    saved = [torch.load(tmp_path / f"step_{step}.ckpt", weights_only=True) for step in (2, 3, 4)]
    assert [checkpoint["skipped_steps"] for checkpoint in saved] == [0, 1, 1]
    assert [checkpoint["global_step"] for checkpoint in saved] == [2, 3, 4]
    assert {int(state["step"]) for state in saved[2]["optimizer_states"][0]["state"].values()} == {3}


def test_resumed_run_counts_steps_skipped_before(recorded, clean, tmp_path):
    uninterrupted = recorded(skip=1, poison=clean.ids[2][0], save_at=[3])
    resumed = recorded(skip=1, poison=-1, resume=f"{tmp_path}/step_3.ckpt")
    assert same(resumed.parameters[-1], uninterrupted.parameters[-1])
    with pytest.raises(
        NonFiniteLossError,
        match=r"optimizer step 4 is nan .*max_skipped_steps \(now 1; skipped so far: 1\)\. Last checkpoint: ",
    ):
        recorded(skip=1, poison=clean.ids[3][0], resume=f"{tmp_path}/step_3.ckpt")


@pytest.mark.parametrize("keep", [True, False], ids=["with checkpoints", "without"])
def test_error_names_step_examples_and_last_checkpoint(recorded, clean, tmp_path, keep):
    with pytest.raises(NonFiniteLossError) as caught:
        recorded(poison=clean.ids[2][0], keep=keep)
    last = tmp_path / "checkpoints" / "last.ckpt"
    message = str(caught.value)
    assert message.startswith("the loss of optimizer step 3 is nan")
    assert f"of the micro-batches concerned: {sorted(clean.ids[2])}. The step was not" in message
    expected = last if keep else "none was written"
    assert message.endswith(
        "To skip such steps, raise model.optimizer.max_skipped_steps (now 0; skipped so far: 0). "
        f"Last checkpoint: {expected}"
    )
    if keep:
        assert torch.load(last, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("value", [torch.inf, 1e20])
def test_gradient_with_infinite_square_stops_before_step(recorded, monkeypatch, value):
    """It would make AdamW's second moment infinite for the rest of the run."""

    def spoil_gradient(self, *args):
        next(iter(adapter_parameters(self.model).values())).grad[0, 0] = value

    monkeypatch.setattr(GateRAModule, "on_after_backward", spoil_gradient)
    with pytest.raises(NonFiniteLossError, match="the norm of its gradients inf"):
        recorded()
