"""Tests of SafePreempt: after a signal the run saves, ends at a safe point, and is requeued under SLURM."""

import os
import signal

import lightning as L
import pytest
import torch
from tiny_backbone import NO_PICTURES, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning import GateRAModule
from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.callbacks.safe_preempt import SafePreempt, requeue_job
from gatera_lightning.cli.main import main
from gatera_lightning.errors import Interrupted, Preempted

BOTH = (signal.SIGUSR1, signal.SIGTERM)


@pytest.fixture(autouse=True)
def stray_signals():
    """The signals that no run handled; also checks that every run restores the earlier handlers."""
    found = []

    def stray(number, frame):
        found.append(number)

    before = [signal.signal(number, stray) for number in BOTH]
    yield found
    assert [signal.getsignal(number) for number in BOTH] == [stray, stray]
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


class SendSignals(L.Callback):
    """Sends signals to this process in the middle of a micro-batch or of a validation."""

    def __init__(self, *numbers, batch=None, validation_after=None):
        self.numbers, self.batch, self.validation_after = numbers, batch, validation_after

    def send(self):
        for number in self.numbers:
            os.kill(os.getpid(), number)

    def on_before_zero_grad(self, trainer, module, optimizer):
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.send()

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.validation_after:
            self.send()


def fit(folder, root, *callbacks, checkpoint=None, resume=None, train="everyday[:48]", **settings):
    checkpoint = checkpoint or AdapterCheckpoint(monitor=None)
    trainer = tiny_trainer(root, checkpoint, SafePreempt(), *callbacks, **settings)
    module = tiny_module(
        folder, warmup_steps=100
    )  # the learning rate rises, so that there is a value to monitor
    trainer.fit(module, datamodule=tiny_data(folder, train=[train]), ckpt_path=resume)
    return module


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize(
    "numbers", [BOTH[:1], BOTH[1:], BOTH, BOTH * 3], ids=["USR1", "TERM", "both", "both three times"]
)
def test_signal_ends_run_once_at_end_of_step(tiny_backbone, tmp_path, stray_signals, numbers):
    """With two micro-batches per step, the signals arrive in the first micro-batch of the second step."""
    with pytest.raises(Preempted) as caught:
        fit(tiny_backbone, tmp_path, SendSignals(*numbers, batch=2), accumulate_grad_batches=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert (caught.value.step, caught.value.checkpoint, caught.value.requeued) == (2, str(last), False)
    assert str(caught.value) == f"preempted at optimizer step 2; saved {last}; resume with --ckpt_path {last}"
    assert step_of(last) == 2
    assert sorted(path.name for path in last.parent.iterdir()) == ["last", "last.ckpt"]
    assert stray_signals == []


def test_run_without_signal_completes(tiny_backbone, tmp_path, stray_signals):
    fit(tiny_backbone, tmp_path)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 4
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stray_signals == [signal.SIGUSR1]


def test_callback_can_be_used_for_second_run(tiny_backbone, tmp_path):
    preempt = SafePreempt()
    for send, steps in ((SendSignals(signal.SIGTERM, batch=1), 2), (SendSignals(), 4)):
        checkpoint = AdapterCheckpoint(monitor=None)
        trainer = tiny_trainer(tmp_path, checkpoint, preempt, send)
        if steps == 2:
            with pytest.raises(Preempted):
                trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
        else:
            trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
        assert trainer.global_step == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [{"batch": 1}, {"validation_after": 2}], ids=["during the step", "during the validation"]
)
@pytest.mark.parametrize("interval", [2, 1.0], ids=["every two steps", "after the epoch"])
def test_due_validation_completes_and_resumed_run_equals_uninterrupted_one(
    tiny_backbone, tmp_path, where, interval
):
    """The best checkpoints are equal too, for a value that always or never improves; two steps per epoch."""
    for mode in ("max", "min"):
        roots = [tmp_path / f"{name}-{mode}" for name in ("uninterrupted", "preempted")]
        settings = {"limit_val_batches": 1, "val_check_interval": interval, "train": "everyday[:16]"}

        def checkpoint(mode=mode):
            return AdapterCheckpoint("lr/update", mode)

        uninterrupted = fit(tiny_backbone, roots[0], checkpoint=checkpoint(), **settings)
        with pytest.raises(Preempted) as caught:
            fit(
                tiny_backbone,
                roots[1],
                SendSignals(signal.SIGUSR1, **where),
                checkpoint=checkpoint(),
                **settings,
            )
        assert caught.value.step == 2
        folder = roots[1] / "checkpoints"
        assert step_of(folder / "best-step=2.ckpt") == step_of(folder / "last.ckpt") == 2
        resumed = fit(
            tiny_backbone, roots[1], checkpoint=checkpoint(), resume=folder / "last.ckpt", **settings
        )
        assert all(
            torch.equal(one, other)
            for one, other in zip(uninterrupted.parameters(), resumed.parameters(), strict=True)
        )
        names = [sorted(path.name for path in (root / "checkpoints").iterdir()) for root in roots]
        assert names[0] == names[1]
        assert f"best-step={4 if mode == 'max' else 2}.ckpt" in names[0]


class SendInEvaluation(L.Callback):
    """Sends SIGTERM in the first batch of any evaluation."""

    def on_test_batch_start(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start


@pytest.mark.parametrize("stage", ["test", "validate", "predict", "fit"])
def test_signal_ends_evaluation(tiny_backbone, tmp_path, stray_signals, stage):
    """In ``fit``, it arrives in the sanity check; Lightning alone would end all of them with success."""
    trainer = tiny_trainer(
        tmp_path,
        AdapterCheckpoint(monitor=None),
        SafePreempt(),
        SendInEvaluation(),
        num_sanity_val_steps=1,
        limit_val_batches=2,
    )
    with pytest.raises(Interrupted) as caught:
        getattr(trainer, stage)(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    assert str(caught.value) == f"ended by SIGTERM during {stage}; its work is not complete"
    assert stray_signals == []


# --- command line and SLURM ---


@pytest.fixture
def preempted(tiny_backbone, tmp_path, monkeypatch, capsys):
    """Run ``fit`` and send it a signal in its second step; returns the exit status and standard error."""

    def send(self, batch, batch_idx):
        if self.trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def start(*flags):
        args = ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *NO_PICTURES, *flags]
        return main(args), capsys.readouterr().err

    monkeypatch.setattr(GateRAModule, "on_train_batch_start", send)
    monkeypatch.chdir(tmp_path)
    return start


LAST = "runs/quickstart/version_0/checkpoints/last.ckpt"


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Install a ``scontrol`` that records its arguments and exits with a status; returns the record."""

    def install(status=0):
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir()
        record = tmp_path / "arguments.txt"
        program.write_text(f'#!/bin/sh\necho "$@" >> {record}\necho "Job is gone" >&2\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return record

    return install


def test_exit_status_outside_of_slurm_is_try_again(preempted, scontrol):
    record = scontrol()
    status, error = preempted()
    assert status == 75
    assert (
        f"gatera_lightning: preempted at optimizer step 2; saved {LAST}; resume with --ckpt_path {LAST}"
        in error
    )
    assert "Traceback" not in error
    assert step_of(LAST) == 2
    assert not record.exists()


def test_slurm_job_is_requeued_and_exit_status_is_success(preempted, scontrol, monkeypatch):
    record = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    status, error = preempted("--ckpt_path", "last")
    assert status == 0
    assert record.read_text() == "requeue Incomplete 17\n"
    assert f"preempted at optimizer step 2; saved {LAST}; the job is requeued and resumes from there" in error
    assert step_of(LAST) == 2


def test_exit_status_after_slurm_refusal_is_try_again(preempted, scontrol, monkeypatch, caplog):
    scontrol(status=1)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    status, error = preempted("--ckpt_path", "last")
    assert status == 75
    assert "cannot requeue job 17: scontrol says Job is gone" in caplog.text
    assert "resume with --ckpt_path" in error


def test_requeue_uses_id_of_array_task(scontrol, monkeypatch):
    record = scontrol()
    variables = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert requeue_job()
    assert record.read_text() == "requeue Incomplete 17_3\n"


def test_requeue_logs_missing_scontrol(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not requeue_job()
    assert "cannot requeue job 17: [Errno 2] No such file or directory: 'scontrol'" in caplog.text


def test_job_is_not_requeued_if_turned_off(preempted, scontrol, monkeypatch):
    record = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert preempted("--ckpt_path", "last", "--preempt.requeue", "false")[0] == 75
    assert not record.exists()


def test_job_that_would_not_resume_is_not_requeued(preempted, scontrol, monkeypatch):
    record = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert preempted()[0] == 75
    assert not record.exists()
