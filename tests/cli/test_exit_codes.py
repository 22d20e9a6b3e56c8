"""Errors that all ranks raise are printed once, before the launcher ends the job."""

import pytest

from gatera_lightning.cli import exit_codes
from gatera_lightning.errors import ConfigError


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_PROCID", None])
@pytest.mark.parametrize("rank", [0, 1])
def test_report_error_gives_rank_zero_time_to_print(monkeypatch, capsys, launcher, rank):
    """torchrun and srun end all ranks once one has ended, which may be another than rank 0."""
    waited = []
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "1")
    monkeypatch.setattr(exit_codes, "global_rank", lambda: rank)
    monkeypatch.setattr(exit_codes.time, "sleep", waited.append)
    error = ConfigError("rows: differ", on_every_process=True)
    assert exit_codes.report_error(error) == exit_codes.ExitCode.USAGE
    assert ("rows: differ" in capsys.readouterr().err) == (rank == 0)
    assert bool(waited) == (rank == 1 and launcher is not None)
