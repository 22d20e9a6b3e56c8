"""``export``: any checkpoint, sharded or not, as the adapter folder that users keep."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.serialization import write_adapter
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.integrity import newest_valid_checkpoint
from gatera_lightning.errors import ConfigError


def export(argv: Sequence[str]) -> None:
    """Write ``--out``, the adapter of a checkpoint, or of the newest sound one in a folder; the backbone is not needed.

    Raises ConfigError for what is no checkpoint of this project, and CheckpointError for a damaged one or another program's.
    """
    args = _parser().parse_args(argv)
    path: Path = args.checkpoint
    if not path.exists():
        raise ConfigError(
            f"CHECKPOINT: {path} does not exist; accepted: a checkpoint (*.ckpt), or a folder of them"
        )
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out: {args.out} is a file; accepted: a folder, which need not exist")
    found = path if path.suffix == ".ckpt" else newest_valid_checkpoint(path)
    if found is None:
        raise ConfigError(f"CHECKPOINT: {path} holds no checkpoint (*.ckpt)")
    checkpoint = AtomicCheckpointIO().load_checkpoint(found, weights_only=True)
    wanted = ("state_dict", "adapter", "backbone", "global_step")
    missing = [name for name in wanted if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise ConfigError(
            f"CHECKPOINT: {found} is no checkpoint of an adapter; it lacks {', '.join(missing)}"
        )
    config = AdapterConfig.from_dict(checkpoint["adapter"])
    tensors = {
        name.removeprefix("model."): tensor.contiguous() for name, tensor in checkpoint["state_dict"].items()
    }
    folder = write_adapter(args.out, tensors, config, checkpoint["backbone"], checkpoint.get("template"))
    print(f"{folder}: the adapter of {found}, at optimizer step {checkpoint['global_step']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gatera_lightning export",
        description="Turn a checkpoint, sharded or not, into an adapter folder, which needs neither Lightning nor pickle.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or a run's folder checkpoints/"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="the adapter folder to write"
    )
    return parser
