"""The summary before training: which tokens carry loss, what is trained, where the logs go."""

import lightning as L
import pytest
from tiny_backbone import run_program, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.run_summary import RunSummary
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.datamodules.loss_mask_view import highlight_supervised


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return tiny_data(tiny_backbone).tokenizer


def batch_of(tokenizer, *texts, train_on="response"):
    rows = [
        TokenSequence(
            tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id], example_id=i
        )
        for i, (prompt, answer) in enumerate(texts)
    ]
    return collate(rows, pad_id=tokenizer.pad_token_id, train_on=train_on)


def test_the_answer_is_marked_and_padding_left_out(tokenizer):
    batch = batch_of(
        tokenizer,
        ("Question: why?\nAnswer:", " so"),
        ("Question: what on earth?\nAnswer:", " a very long one"),
    )
    assert (
        str(highlight_supervised(tokenizer, batch, 0, color=False))
        == "  Question: why?\n  Answer:⟦ so<|eos|>⟧"
    )
    assert (
        str(highlight_supervised(tokenizer, batch, 1, color=False))
        == "  Question: what on earth?\n  Answer:⟦ a very long one<|eos|>⟧"
    )


def test_with_colour_the_answer_is_green_and_has_no_brackets(tokenizer):
    text = highlight_supervised(tokenizer, batch_of(tokenizer, ("Why? Answer:", " so")), 0, color=True)
    assert text.plain == "  Why? Answer: so<|eos|>"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles == {"Why? Answer:": "dim", " so<|eos|>": "bold green"}


def test_training_on_all_tokens_marks_all_but_the_first(tokenizer):
    batch = batch_of(tokenizer, ("Why? Answer:", " so"), train_on="all")
    text = str(highlight_supervised(tokenizer, batch, 0, color=False))
    first = tokenizer.decode(batch["input_ids"][0, :1])
    assert text == f"  {first}⟦{'Why? Answer: so<|eos|>'.removeprefix(first)}⟧"


def test_several_stretches(tokenizer):
    """A dialogue in which two turns carry loss: the labels decide, not the answer's place."""
    pieces = [("user: hi", False), (" bot: hello", True), (" user: bye", False), (" bot: see you", True)]
    ids = [(token, loss) for text, loss in pieces for token in tokenizer(text).input_ids]
    batch = collate([TokenSequence([t for t, _ in ids], [], example_id=0)], pad_id=0, train_on="all")
    for i, (_, loss) in enumerate(ids):
        if not loss:
            batch["labels"][0, i] = -100
    assert (
        str(highlight_supervised(tokenizer, batch, 0, color=False))
        == "  user: hi⟦ bot: hello⟧ user: bye⟦ bot: see you⟧"
    )


def test_brackets_in_a_question_are_printed_as_they_are(tokenizer, capsys):
    from rich.console import Console

    batch = batch_of(tokenizer, ("Is [bold]x[/bold] [1]? Answer:", " [red]"))
    Console().print(highlight_supervised(tokenizer, batch, 0, color=False))
    assert "Is [bold]x[/bold] [1]? Answer:⟦ [red]<|eos|>⟧" in capsys.readouterr().out


@pytest.mark.parametrize(("gate", "trainable"), [("token", "2,922"), ("none", "2,560")])
def test_what_a_run_prints(tiny_backbone, tmp_path, capsys, gate, trainable):
    module, data = tiny_module(tiny_backbone, gate=gate), tiny_data(tiny_backbone)
    trainer = tiny_trainer(tmp_path, RunSummary(), max_steps=1)
    trainer.fit(module, datamodule=data)
    # Rank 4 in q (32 -> 32), k and v (32 -> 16), up (32 -> 48) and down (48 -> 32); a token gate has in + 1 values.
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


def test_counts_are_by_dtype(tiny_backbone, tmp_path, capsys):
    module = tiny_module(tiny_backbone)
    module.backbone.dtype = "bfloat16"
    tiny_trainer(tmp_path, RunSummary(), max_steps=1).fit(module, datamodule=tiny_data(tiny_backbone))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trainable", "float32", "2,922"] in lines
    assert ["frozen", "bfloat16", "41,120"] in lines


def test_a_log_folder_with_brackets_is_named_as_it_is(tiny_backbone, tmp_path, capsys):
    folder = tmp_path / "[red]runs"
    tiny_trainer(folder, RunSummary(), max_steps=1).fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone)
    )
    assert f"logs and checkpoints: {folder}" in capsys.readouterr().out


def test_it_changes_no_random_number(tiny_backbone, tmp_path):
    """A callback only watches: the same run with and without it."""

    def losses(*callbacks):
        L.seed_everything(1, verbose=False)
        module = tiny_module(tiny_backbone, dropout=0.3)
        trainer = tiny_trainer(tmp_path, *callbacks, max_steps=2)
        trainer.fit(module, datamodule=tiny_data(tiny_backbone))
        return float(trainer.callback_metrics["train/loss"])

    assert losses(RunSummary()) == losses()


@pytest.mark.slow
def test_two_processes_do_not_wait_for_each_other(tiny_backbone, tmp_path):
    """``trainer.log_dir`` is asked of all processes at once: only one of them asking would hang the run."""
    args = ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone)]
    printed = run_program(
        *args, "--trainer.devices", "2", "--trainer.strategy", "ddp", cwd=tmp_path, timeout=90
    )
    assert printed.count("a training example, tokens with loss marked:") == 1
    assert "logs and checkpoints: runs/quickstart/version_0" in printed
