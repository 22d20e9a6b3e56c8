"""The run folder: its config, and the run that owns it."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from gatera_lightning.checkpointing.run_lock import claim, release
from gatera_lightning.errors import ConfigError


class RunFolder(SaveConfigCallback):
    """Claims the run folder for this run and saves the config in it, before weights are loaded."""

    _claimed: Path | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Claim the folder and save the config; a collective.

        Raises:
            ConfigError: On every rank, if another run holds the folder or has left its config there.
        """
        folder = trainer.log_dir  # a collective: all ranks read it
        problem = None
        if trainer.is_global_zero and folder is not None and not self.already_saved:
            self._claimed = Path(folder)
            problem = claim(self._claimed) or self._config_problem(self._claimed)
        if problem := trainer.strategy.broadcast(problem):
            raise ConfigError(problem, on_every_rank=True)
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

    def _config_problem(self, folder: Path) -> str | None:
        config = folder / self.config_filename
        if self.overwrite or not config.is_file():
            return None
        return (
            f"the run folder {folder} already has the {self.config_filename} of another run; accepted: "
            "another folder or version for it (--trainer.logger.init_args.version), --ckpt_path last to "
            "resume that run, or remove its folder"
        )
