"""A run of ``fit_script.py`` that measures how much of the sharded model each rank holds.

``python sharding_script.py JOB``: every rank writes ``held_RANK.json`` with bytes measured while the model
was loaded, and rank 0 writes ``loaded.pt`` with the unsharded parameters and the buffers.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from fit_script import Job, run
from torch.distributed.tensor import DTensor

from gatera_lightning.backbone.probes import returns_head_output
from gatera_lightning.distributed.sharded_loading import load_sharded
from gatera_lightning.training import model_loading


def live_bytes():
    """Bytes of the tensors with memory that were created since the last ``gc.freeze()``."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and not isinstance(found, DTensor) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main(job):
    seen, held = {}, {"peak": 0}
    broadcast = torch.distributed.broadcast

    def watched_broadcast(*args, **kwargs):
        held["peak"] = max(held["peak"], live_bytes())
        return broadcast(*args, **kwargs)

    def watched_load(*args, **kwargs):
        gc.collect()
        gc.freeze()
        torch.distributed.broadcast = watched_broadcast
        seen["model"], report = load_sharded(*args, **kwargs)
        torch.distributed.broadcast = broadcast
        held["peak"] = max(held["peak"], live_bytes())
        frozen = [parameter for parameter in seen["model"].parameters() if not parameter.requires_grad]
        held["frozen"] = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
        held["frozen_here"] = sum(p.to_local().numel() * p.element_size() for p in frozen)
        full = {name: parameter.full_tensor() for name, parameter in seen["model"].named_parameters()}
        seen["loaded"] = {"parameters": full, "buffers": dict(seen["model"].named_buffers())}
        return seen["model"], report

    model_loading.load_sharded = watched_load
    run(job)
    model, rank, out = seen["model"], torch.distributed.get_rank(), Path(job.out)
    held["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    held["in_head"] = returns_head_output(model)
    (out / f"held_{rank}.json").write_text(json.dumps(held))
    if rank == 0:
        torch.save(seen["loaded"], out / "loaded.pt")


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
