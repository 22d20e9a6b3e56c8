"""`export`: the adapter folder of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.serialization import write_adapter
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.contents import check_entries
from gatera_lightning.checkpointing.integrity import newest_valid_checkpoint
from gatera_lightning.checkpointing.output_check import folder_problem
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.errors import ConfigError
from gatera_lightning.terminal.printing import print_text
from gatera_lightning.training import hyperparameters  # noqa: F401  # reads settings of version 0.1

_REQUIRED_KEYS = ("state_dict", "adapter", "backbone", "global_step")


def export(argv: Sequence[str]) -> None:
    """Write the adapter folder `--out` from a checkpoint, or from the newest valid one in a folder.

    The backbone is not needed.

    Args:
        argv: The flags.

    Raises:
        ConfigError: The path is not a checkpoint of this package.
        CheckpointError: The checkpoint is corrupt, or contains pickled classes that are not allowed.
    """
    args = _parser().parse_args(argv)
    path: Path = args.checkpoint
    if not path.exists():
        raise ConfigError(
            f"CHECKPOINT: {path} does not exist; accepted: a checkpoint (*.ckpt), or a folder of checkpoints"
        )
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out: {args.out} is a file; accepted: a folder, which does not have to exist")
    if problem := folder_problem(args.out):
        raise ConfigError(f"--out: {args.out} cannot be written ({problem}); accepted: a writable folder")
    found = path if path.suffix == ".ckpt" else newest_valid_checkpoint(path)
    if found is None:
        raise ConfigError(f"CHECKPOINT: {path} holds no checkpoint (*.ckpt)")
    checkpoint = AtomicCheckpointIO().load_checkpoint(found, weights_only=True)
    if missing := [
        key for key in _REQUIRED_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint
    ]:
        raise ConfigError(
            f"CHECKPOINT: {found} is not a checkpoint of an adapter; missing entries: {', '.join(missing)}"
        )
    check_entries(checkpoint, found)
    config = AdapterConfig.from_dict(checkpoint["adapter"])
    tensors = {
        name.removeprefix("model."): tensor.contiguous() for name, tensor in checkpoint["state_dict"].items()
    }
    folder = write_adapter(args.out, tensors, config, checkpoint["backbone"], checkpoint.get("template"))
    print_text(f"{folder}: the adapter of {found}, at optimizer step {checkpoint['global_step']}")


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "export",
        description="Write the adapter folder of a checkpoint, sharded or not. The folder loads without "
        "Lightning and without pickle.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a checkpoint, or a run's folder checkpoints/, of which the newest valid one is used",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="the adapter folder to write"
    )
    return parser
