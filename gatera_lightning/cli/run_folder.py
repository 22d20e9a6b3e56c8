"""The run folder: its config, and the run that owns it."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from gatera_lightning.checkpointing.output_check import file_problem
from gatera_lightning.checkpointing.run_lock import claim, release
from gatera_lightning.errors import ConfigError


class RunFolder(SaveConfigCallback):
    """Claims the run folder for this run and saves the config in it, before weights are loaded.

    An evaluation in the folder of a training run leaves that run's config as it is.
    """

    _claimed: Path | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Claim the folder and save the config; a collective.

        Raises:
            ConfigError: On every rank, if another run holds the folder or has left its config there.
        """
        folder = trainer.log_dir  # a collective: all ranks read it
        problem, config_exists = None, False
        if trainer.is_global_zero and folder is not None and not self.already_saved:
            self._claimed = Path(folder)
            config = self._claimed / self.config_filename
            config_exists = config.is_file()
            problem = claim(self._claimed)
            written = stage == "fit" or not config_exists
            if problem is None and written and (unusable := file_problem(config)):
                problem = f"the run folder {self._claimed} cannot be used ({unusable}); accepted: another one"
            if config_exists and stage == "fit" and not self.overwrite:
                problem = problem or self._config_problem(trainer)
        problem, config_exists = trainer.strategy.broadcast((problem, config_exists))
        if problem:
            raise ConfigError(problem, on_every_rank=True)
        if config_exists and stage != "fit":
            return  # the config of the training run stays
        super().setup(trainer, pl_module, stage)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._claimed is not None:
            release(self._claimed)

    def _config_problem(self, trainer: Trainer) -> str:
        other = (
            "another version (--trainer.logger.init_args.version)"
            if trainer.loggers
            else "another folder (--trainer.default_root_dir)"
        )
        return (
            f"the run folder {self._claimed} already has the {self.config_filename} of another run; "
            f"accepted: {other}, or --ckpt_path last to resume that run"
        )
