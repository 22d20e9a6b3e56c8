"""Tensors that autograd saves for the backward pass, and those that are alive after one."""

import gc

import torch


def saved_by(run):
    """Return the result of ``run()`` and every tensor that autograd saved for its backward pass."""
    saved = []

    def save(tensor):
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        return run(), saved


def tensors_made_by(run):
    """Return the result of ``run()`` and the tensors it made that are still alive anywhere.

    What is alive before is frozen, so that a collection takes microseconds; the caller thaws it by
    ``gc.unfreeze()`` after its last test.
    """
    gc.freeze()
    result = run()
    gc.collect()
    return result, [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]


def storage(tensor):
    """Return the address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()
