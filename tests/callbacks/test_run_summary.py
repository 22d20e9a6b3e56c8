"""Tests of RunSummary: adapted layers, parameter counts, a training example and the log folder."""

import lightning as L
import pytest
from tiny_backbone import NO_PICTURES, run_program, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.adapters.gates import GATES
from gatera_lightning.callbacks.run_summary import RunSummary
from gatera_lightning.datamodules.loss_mask_view import highlight_supervised
from gatera_lightning.gate_analysis.statistics import counted_tokens


@pytest.mark.parametrize(("gate", "trainable"), [("token", "2,922"), ("none", "2,560")])
def test_summary_of_run(tiny_backbone, tmp_path, capsys, gate, trainable):
    module, data = tiny_module(tiny_backbone, gate=gate), tiny_data(tiny_backbone)
    trainer = tiny_trainer(tmp_path, RunSummary(), max_steps=1)
    trainer.fit(module, datamodule=data)
    # Rank 4 in q (32 -> 32), k and v (32 -> 16), up (32 -> 48), down (48 -> 32); gates have in + 1 values.
    update, gates = 4 * (64 + 48 + 48 + 80 + 80), 4 * 33 + 49
    assert f"{2 * (update + (gates if gate == 'token' else 0)):,}" == trainable
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "10 adapted layers (q_proj × 2, k_proj × 2, v_proj × 2, up_proj × 2, down_proj × 2); "
    )
    assert f"{trainable} trainable parameters" in lines[0]
    assert lines[1].split() == ["trainable", "float32", trainable]
    assert lines[2].split() == ["frozen", "float32", "41,120"]
    assert lines[-1] == f"logs and checkpoints: {tmp_path}"
    example = "\n".join(lines[4:-1])
    assert example == str(
        highlight_supervised(data.tokenizer, trainer.train_dataloader.dataset[0], 0, color=False)
    )
    assert example.count("⟦") == example.count("⟧") == 1
    assert example.endswith("<|eos|>⟧")


def test_summary_counts_parameters_by_dtype(tiny_backbone, tmp_path, capsys):
    module = tiny_module(tiny_backbone)
    module.backbone.dtype = "bfloat16"
    tiny_trainer(tmp_path, RunSummary(), max_steps=1).fit(module, datamodule=tiny_data(tiny_backbone))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trainable", "float32", "2,922"] in lines
    assert ["frozen", "bfloat16", "41,120"] in lines


def test_summary_prints_log_folder_with_brackets(tiny_backbone, tmp_path, capsys):
    folder = tmp_path / "[red]runs"
    tiny_trainer(folder, RunSummary(), max_steps=1).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert f"logs and checkpoints: {folder}" in capsys.readouterr().out


def test_summary_does_not_change_training(tiny_backbone, tmp_path):
    """The same run with and without the callback."""

    def losses(*callbacks):
        L.seed_everything(1, verbose=False)
        module = tiny_module(tiny_backbone, dropout=0.3)
        trainer = tiny_trainer(tmp_path, *callbacks, max_steps=2)
        trainer.fit(module, datamodule=tiny_data(tiny_backbone))
        return float(trainer.callback_metrics["train/loss"])

    assert losses(RunSummary()) == losses()


@pytest.mark.slow
def test_two_ranks_do_not_deadlock(tiny_backbone, tmp_path):
    """``trainer.log_dir`` is a collective: if only one rank read it, the run would hang."""
    args = ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *NO_PICTURES]
    printed = run_program(
        *args, "--trainer.devices", "2", "--trainer.strategy", "ddp", cwd=tmp_path, timeout=200
    )
    assert printed.count("a training example, with its supervised tokens marked:") == 1
    assert "logs and checkpoints: runs/quickstart/version_0" in printed


@pytest.mark.parametrize("gate", ["hard", "token"])
def test_summary_ends_with_skipped_tokens_of_the_last_step(tiny_backbone, tmp_path, capsys, gate):
    module, counted = tiny_module(tiny_backbone, gate=GATES[gate](bias=0.0)), []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            z, mask = outputs["gates"].stacked(batch["attention_mask"]), counted_tokens(batch)
            counted.append(((z[:, mask] <= 0).sum(), mask.sum() * len(z)))

    trainer = tiny_trainer(tmp_path, RunSummary(), Count(), max_steps=3, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=tiny_data(tiny_backbone))
    out = capsys.readouterr().out
    assert ("skipped by gates" in out) == (gate == "hard")
    if gate == "hard":
        (skipped, tokens), (more, more_tokens) = counted[-2:]
        share = float((skipped + more) / (tokens + more_tokens))
        assert f"skipped by gates in the last optimizer step: {share:.1%} of" in out
        assert "; by layer 0: " in out
