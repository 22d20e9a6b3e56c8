"""A whole backbone folder, small enough to train in a second, and runs on it: by CLI flags or by hand."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path

import lightning as L
import torch
from bounded_programs import run_bounded

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SAMPLES = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "everyday"
NO_PICTURES = ["--gate_heatmap.every_n_steps", "0", "--generated_samples.prompts", "0"]
"""CLI flags that save a few seconds per run: no heatmaps and no samples."""


def sample_rows(split):
    """The embedded rows of a split, as they stand in the file."""
    return json.loads((SAMPLES / f"{split}.json").read_text(encoding="utf-8"))


@dataclass
class PlainQuestion:
    """One row read without the package's parser: the ``plain`` prompt and its candidate answers."""

    prompt: str
    answers: list[str]
    gold: int

    @classmethod
    def of(cls, row):
        head, options = row["instruction"].split("\n\n")[:2]
        asked = head.removeprefix("Please choose the correct answer to the question: ")
        answers = [" " + text.strip() for text in re.split(r"Answer\d+:", options)[1:]]
        return cls(f"Question: {asked}\nAnswer:", answers, int(row["answer"].removeprefix("answer")) - 1)


def tiny_tokenizer(pad=True):
    """A byte-level BPE of 400 entries, trained on the embedded samples."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = [row for split in ("train", "validation", "test") for row in sample_rows(split)]
    backend.train_from_iterator((f"{row['instruction']}\n{row['output']}" for row in rows), trainer)
    special = {"pad_token": PAD} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, **special)


def tiny_backbone_folder(path, pad=True):
    """Save a two-layer Llama (hidden 32) and its tokenizer to ``path``, where Auto classes find them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(pad)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def tiny_args(folder):
    """CLI flags that make any recipe a run of a second."""
    return [
        *(
            "--model.backbone.id",
            str(folder),
            "--model.backbone.dtype",
            "float32",
            "--model.adapter.rank",
            "4",
        ),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.max_steps", "3", "--trainer.limit_val_batches", "2"),
        *("--data.init_args.train", '["everyday[:48]"]', "--data.init_args.validation", '["everyday[:16]"]'),
        *("--data.init_args.test", '["everyday[:6]"]'),
    ]


def run_program(*args, cwd, timeout=120):
    """Run ``python -m gatera_lightning ARGS`` in a folder and return its output, errors among it."""
    command = [sys.executable, "-m", "gatera_lightning", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = run_bounded(command, timeout=timeout, cwd=cwd, env=environment, stderr=subprocess.STDOUT)
    assert program.returncode == 0, program.stdout[-4000:]
    return program.stdout


def tiny_module(folder, warmup_steps=0, entropy_weight=0.01, objectives=None, **adapter):
    """A GateRAModule on the backbone in ``folder``, rank 4."""
    from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig

    config = AdapterConfig(**({"rank": 4} | adapter))
    if "entropy_weight" in {field.name for field in fields(config.gate)}:
        config.gate = replace(config.gate, entropy_weight=entropy_weight)
    return GateRAModule(
        backbone=BackboneConfig(id=str(folder), dtype="float32"),
        adapter=config,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=warmup_steps),
        objectives=objectives,
    )


def tiny_data(folder, **settings):
    """The first embedded questions, connected to the tokenizer in ``folder``; batches of unequal lengths."""
    from gatera_lightning import BackboneConfig
    from gatera_lightning.backbone.loading import load_tokenizer
    from gatera_lightning.datamodules import CommonsenseDataModule

    defaults = {
        "template": "plain",
        "answer_format": "content",
        "train_on": "response",
        "train": ["everyday[:48]"],
        "validation": ["everyday[:7]"],
        "test": ["everyday[:6]"],
        "batch_size": 8,
        "eval_batch_size": 5,
        "group_by_length": False,
    }
    data = CommonsenseDataModule(**(defaults | settings))
    data.connect(load_tokenizer(BackboneConfig(id=str(folder))))
    return data


def tiny_trainer(root, *callbacks, **settings):
    """A quiet CPU Trainer for four optimizer steps."""
    defaults = {
        "max_steps": 4,
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_checkpointing": any(
            isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks
        ),
    }
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=root,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **(defaults | settings),
    )
