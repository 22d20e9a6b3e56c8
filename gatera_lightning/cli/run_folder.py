"""The run folder: its config, and the run that owns it and the folders of its other loggers."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typing_extensions import override

from gatera_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from gatera_lightning.checkpointing.output_check import file_problem
from gatera_lightning.checkpointing.run_lock import claim, release
from gatera_lightning.errors import ConfigError


class RunFolder(SaveConfigCallback):
    """Claims the run folder for this run and saves the config in it, before weights are loaded.

    The run folder is the ``log_dir`` of a TensorBoard or CSV logger if that is the first one, else its
    ``save_dir``, or ``trainer.default_root_dir``. Checkpoints are kept in it.

    An evaluation in the folder of a training run leaves that run's config as it is.
    """

    _claimed: tuple[Path, ...] = ()  # the run folder is the first

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Claim the run folder and those of all loggers, and save the config; a collective.

        Raises:
            ConfigError: On every rank, if another run holds a folder or has left its config in the run's.
        """
        # log_dir is a collective: all ranks read it. A logger that writes to a server has none.
        folder = str(trainer.log_dir or trainer.default_root_dir)
        problem, config_exists = None, False
        if trainer.is_global_zero and not self.already_saved:
            config = Path(folder) / self.config_filename
            config_exists = config.is_file()
            problem = _remote_problem(folder) or self._claim(Path(folder))
            written = stage == "fit" or not config_exists
            if problem is None and written and (unusable := file_problem(config)):
                problem = f"the run folder {config.parent} cannot be used ({unusable}); accepted: another one"
            if config_exists and stage == "fit" and not self.overwrite:
                problem = problem or self._config_problem(trainer, Path(folder))
            problem = problem or self._claim_of_loggers(trainer)
        problem, config_exists = trainer.strategy.broadcast((problem, config_exists))
        if problem:
            raise ConfigError(problem, on_every_rank=True)
        if config_exists and stage != "fit":
            return  # the config of the training run stays
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterCheckpoint):
                callback.keep_in(Path(folder))  # where `--ckpt_path last` looks, whatever the logger is
        self.save_to_log_dir = False  # it is not always there, so save_config writes the file
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config to the run folder; rank 0 alone is asked."""
        folder = self._claimed[0]
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config,
            str(folder / self.config_filename),
            skip_none=False,
            overwrite=self.overwrite,
            multifile=self.multifile,
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _claim(self, folder: Path) -> str | None:
        """Claim a folder, once; return why it cannot be used."""
        folder = folder.resolve()
        if folder in self._claimed:
            return None
        problem = claim(folder)
        if problem is None:
            self._claimed += (folder,)
        return problem

    def _claim_of_loggers(self, trainer: Trainer) -> str | None:
        """Claim what each logger keeps for this run alone.

        A logger without a ``log_dir`` makes its own folder for each run in a ``save_dir`` that runs share.
        """
        for logger in trainer.loggers:
            folder = logger.log_dir
            if folder is None or "://" in str(folder):  # no folder of its own, or a remote one
                continue
            if problem := self._claim(Path(folder)):
                return f"trainer.logger: {type(logger).__name__}: {problem}"
        return None

    def _release(self) -> None:
        for folder in self._claimed:
            release(folder)
        self._claimed = ()

    def _config_problem(self, trainer: Trainer, folder: Path) -> str:
        logger = trainer.loggers[0] if trainer.loggers else None
        if logger is None:
            other = "another folder (--trainer.default_root_dir)"
        elif isinstance(logger, TensorBoardLogger | CSVLogger):
            other = "another version (--trainer.logger.init_args.version)"
        else:
            setting = "default_root_dir" if logger.save_dir is None else "logger.init_args.save_dir"
            other = f"another folder (--trainer.{setting}), a TensorBoardLogger as the first of several"
            other += " loggers"
        return (
            f"the run folder {folder} already has the {self.config_filename} of another run; "
            f"accepted: {other}, or --ckpt_path last to resume that run"
        )


def _remote_problem(folder: str) -> str | None:
    """Refuse an address; paths of checkpoints would make a local folder of that name."""
    if "://" not in folder:
        return None
    return (
        f"the run folder {folder} is remote, but checkpoints are written atomically in it; accepted: "
        "a local or mounted folder (trainer.logger.init_args.save_dir, trainer.default_root_dir), with a "
        "logger that writes to the address as the second one"
    )
