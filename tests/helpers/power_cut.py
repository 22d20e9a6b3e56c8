"""Command lines that end in the middle of a run."""

import pytest

from gatera_lightning.cli.main import main
from gatera_lightning.training.module import GateRAModule

ADAPTER = "checkpoints/last/adapter_model.safetensors"


class PowerCut(BaseException):
    """Ends a run from outside; the program reports it like any other failure."""


def cut_off(command, step):
    """Run a command line, and end it at the first micro-batch after this many optimizer steps."""

    def cut(self, batch, batch_idx):
        if self.trainer.global_step == step:
            raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GateRAModule, "on_train_batch_start", cut)
        assert main(command) == 1
