"""Loggers with folders unlike TensorBoard's, for configs of tests."""

from lightning.pytorch.loggers import Logger


class ServerLogger(Logger):
    """Keeps everything elsewhere and has no folder here, like MLflow's with the address of a server."""

    name, version = "project", "run-1"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class FolderLogger(ServerLogger):
    """Has one folder for all runs, like that of Weights & Biases."""

    save_dir = "logs"
