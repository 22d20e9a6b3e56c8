"""`export`: the adapter of a checkpoint or of an adapter folder, in the format that another program reads."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.adapters.serialization import read_adapter, write_adapter
from gatera_lightning.adapters.stored_config import CONFIG_FILE
from gatera_lightning.backbone.config import stored_backbone
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer
from gatera_lightning.backbone.quantization import dequantize_linear_layers
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.integrity import CHECKPOINT_FOLDER, newest_valid_checkpoint
from gatera_lightning.checkpointing.output_check import folder_problem
from gatera_lightning.cli.adapter_argument import ACCEPTED, adapter_folder
from gatera_lightning.cli.merged_model import read_texts, write_merged_model
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.errors import ConfigError
from gatera_lightning.terminal.printing import print_text
from gatera_lightning.training import hyperparameters  # noqa: F401  # reads settings of version 0.1
from gatera_lightning.training.checkpoint_contents import check_contents

_REQUIRED_KEYS = ("state_dict", "adapter", "backbone", "global_step")
_FORMATS = {
    "gatera": "an adapter folder of this package, which PEFT reads once gatera_lightning.peft is imported",
    "peft": "PEFT's own LoRA, DoRA or HiRA, which needs nothing of this package",
    "lora": "PEFT's LoRA and nothing else, for inference engines",
    "merged": "the backbone with the adapter in its weights, a plain Hugging Face folder",
}


@dataclass(frozen=True)
class _Adapter:
    """An adapter without its backbone."""

    config: AdapterConfig
    origin: dict[str, Any]
    tensors: dict[str, Tensor]
    template: str | None
    source: str


def export(argv: Sequence[str]) -> None:
    """Write the adapter of a checkpoint or of an adapter folder to `--out`.

    Only `--format merged` needs the backbone.

    Args:
        argv: The flags.

    Raises:
        ConfigError: The path is neither a checkpoint of this package nor an adapter folder, or the adapter
            cannot be written in this format.
        CheckpointError: The checkpoint is corrupt, or contains pickled classes that are not allowed.
        AdapterFileError: The adapter folder cannot be read.
    """
    args = _parser().parse_args(argv)
    _check_arguments(args)
    adapter = _read(args.checkpoint)
    if args.format == "merged":
        _write_merged(args, adapter)
        return
    if args.format == "gatera":
        folder = write_adapter(args.out, adapter.tensors, adapter.config, adapter.origin, adapter.template)
    else:
        from gatera_lightning.peft.own_methods import peft_method_problem, write_peft_method

        if problem := peft_method_problem(adapter.config, lora_only=args.format == "lora"):
            raise ConfigError(f"--format {args.format}: {args.checkpoint}: {problem}")
        folder = write_peft_method(args.out, adapter.tensors, adapter.config, adapter.origin)
    print_text(f"{folder}: the adapter of {adapter.source}")
    if args.format in ("peft", "lora") and adapter.config.gate.needs_mask:
        print_text(
            f"  other programs do not read its {adapter.config.gate.kind!r} gate: they apply the update to "
            "every token, and not only to those of the gate's mask"
        )


def _check_arguments(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out: {args.out} is a file; accepted: a folder, which does not have to exist")
    if problem := folder_problem(args.out):
        raise ConfigError(f"--out: {args.out} cannot be written ({problem}); accepted: a writable folder")
    if args.format == "merged" and args.out.exists():
        raise ConfigError(f"--out: {args.out} exists; accepted with --format merged: a new folder")
    if args.constant_gate and (args.format != "merged" or args.rows is None):
        raise ConfigError("--constant_gate: accepted with --format merged and --rows FILE")
    if args.rows is not None and args.format != "merged":
        raise ConfigError("--rows: accepted with --format merged")


def _read(path: Path) -> _Adapter:
    """Read a checkpoint, the newest valid one in a folder, or an adapter folder."""
    if (path / CONFIG_FILE).is_file():
        found = None
    elif path.suffix == ".ckpt" and path.exists():
        found = path
    else:
        found = _newest_checkpoint(path)
    if found is None:
        folder = Path(adapter_folder(str(path), "CHECKPOINT"))
        if not (folder / CONFIG_FILE).is_file():
            reason = "does not exist"
            if path.exists():
                reason = "holds neither a checkpoint (*.ckpt) nor an adapter"
            raise ConfigError(f"CHECKPOINT: {path} {reason}; accepted: a checkpoint (*.ckpt), {ACCEPTED}")
        stored, tensors = read_adapter(folder)
        return _Adapter(stored.config, stored.origin, tensors, stored.template, str(folder))
    checkpoint = AtomicCheckpointIO().load_checkpoint(found, weights_only=True)
    if missing := [
        key for key in _REQUIRED_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint
    ]:
        raise ConfigError(
            f"CHECKPOINT: {found} is not a checkpoint of an adapter; missing entries: {', '.join(missing)}"
        )
    check_contents(checkpoint, found)
    return _Adapter(
        AdapterConfig.from_dict(checkpoint["adapter"]),
        checkpoint["backbone"],
        {n.removeprefix("model."): tensor.contiguous() for n, tensor in checkpoint["state_dict"].items()},
        checkpoint.get("template"),
        f"{found}, at optimizer step {checkpoint['global_step']}",
    )


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest valid checkpoint of a folder of checkpoints, or of a run's folder."""
    return newest_valid_checkpoint(folder) or newest_valid_checkpoint(folder / CHECKPOINT_FOLDER)


def _write_merged(args: argparse.Namespace, adapter: _Adapter) -> None:
    if adapter.config.gate.needs_mask:
        raise ConfigError(
            f"--format merged: {args.checkpoint} has a {adapter.config.gate.kind!r} gate, whose update "
            "applies to the tokens of a mask only, so no single matrix equals it; accepted: another --format"
        )
    gate = adapter.config.gate.build(1, dtype=torch.float32, device=torch.device("cpu"))
    if gate is not None and gate.depends_on_token and not args.constant_gate:
        raise ConfigError(
            f"--format merged: {args.checkpoint} has a {adapter.config.gate.kind!r} gate, whose value "
            "differs between tokens, so no single matrix equals it; accepted: --constant_gate --rows FILE, "
            "which replaces each gate by its mean over these texts (of its decisions 0 or 1, if it is a hard "
            "or threshold gate) and reports what that changes"
        )
    if adapter.origin["id"] is None:
        raise ConfigError(f"CHECKPOINT: {args.checkpoint} does not store the id of its backbone")
    texts = None if args.rows is None else read_texts(args.rows)
    backbone = stored_backbone(adapter.origin, args.dtype)
    tokenizer, model = load_tokenizer(backbone), load_backbone(backbone)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), adapter.tensors, adapter.config, adapter.origin, None)
        load_adapter(model, folder)
    if backbone.quantization != "none":
        dequantize_linear_layers(model)
    report = write_merged_model(model, tokenizer, args.out, texts)
    print_text(f"{args.out}: the backbone with the adapter of {adapter.source}, in {args.dtype}")
    if backbone.quantization != "none":
        print_text(f"  merged into the dense values of weights that were stored as {backbone.quantization}")
    for line in report.lines():
        print_text(f"  {line}")


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "export",
        description="Write the adapter of a checkpoint, sharded or not, or of an adapter folder, for other "
        "programs. What is written loads without Lightning and without pickle.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a checkpoint; a run's folder, of which the newest valid checkpoint is used; or an adapter "
        "folder or an adapter's id on the hub, also of PEFT's own LoRA, DoRA or HiRA",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--format",
        choices=list(_FORMATS),
        default="gatera",
        help="; ".join(f"{name}: {text}" for name, text in _FORMATS.items()) + " (default: gatera)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of the merged weights (default: float32)",
    )
    parser.add_argument(
        "--constant_gate",
        "--constant-gate",
        action="store_true",
        help="merge a token gate as a constant, its mean over the texts of --rows; for a hard or threshold "
        "gate, the share of tokens that keep their update",
    )
    parser.add_argument(
        "--rows",
        metavar="FILE",
        help="texts to measure the merged model on: JSON, JSON Lines, CSV, TSV or Parquet with a field text, "
        "or any other text file, one per line; FILE[start:stop] takes a part",
    )
    return parser
