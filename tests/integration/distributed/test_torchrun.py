"""Ranks started by torchrun train the same adapter as ranks started by Lightning."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
from tiny_backbone import run_program, tiny_args

pytestmark = pytest.mark.slow

OVERLAYS = {"ddp": [], "fsdp": ["--config", "overlays/fsdp.yaml"]}


def torchrun(*args, cwd, ranks=2, timeout=180):
    """Run ``torchrun -m gatera_lightning ARGS`` in a folder; if it hangs, kill all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(ranks), "--master-port", str(port)]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "-m", "gatera_lightning", *args], cwd=cwd, env=environment, **options
    ) as program:
        try:
            output, _ = program.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # The ranks are not in this process group; torchrun ends them when it is terminated.
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.terminate()
                program.wait(60)
            raise AssertionError(f"still running after {timeout} s: {' '.join(args)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, output[-4000:]
    return output


@pytest.mark.parametrize("strategy", OVERLAYS)
def test_torchrun_trains_the_adapter_of_lightnings_launcher(strategy, tiny_backbone, tmp_path):
    args = ["fit", "--config", "quickstart.yaml", *OVERLAYS[strategy], *tiny_args(tiny_backbone)]
    args += ["--trainer.devices", "2"]
    args += ["--model.adapter.dropout", "0.1", "--trainer.accumulate_grad_batches", "2"]
    outputs, adapters = {}, {}
    for name, start in (("own", run_program), ("torchrun", torchrun)):
        outputs[name] = start(*args, "--trainer.logger.init_args.save_dir", name, cwd=tmp_path, timeout=180)
        (adapters[name],) = tmp_path.glob(f"{name}/**/checkpoints/last/adapter_model.safetensors")
    assert adapters["torchrun"].read_bytes() == adapters["own"].read_bytes()
    assert all("MEMBER: 2/2" in output for output in outputs.values())
    assert outputs["torchrun"].count("All distributed processes registered. Starting with 2 processes") == 1
