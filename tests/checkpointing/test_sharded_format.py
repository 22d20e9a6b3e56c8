"""Sharded checkpoints restore what was written, and never run code from their metadata."""

import hashlib
import json
import re

import pytest
import torch
from sample_checkpoints import is_checkpoint

from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.sharded_format import map_tensors, read_sharded
from gatera_lightning.errors import CheckpointError


def test_read_sharded_returns_what_was_written(sharded_checkpoint):
    assert is_checkpoint(read_sharded(sharded_checkpoint, weights_only=True))


def test_map_tensors_passes_paths_and_keeps_the_structure():
    seen = []

    def double(name, tensor):
        seen.append(name)
        return 2 * tensor

    state = {"a": torch.ones(1), "b": [torch.ones(2), ("text", torch.ones(3))], 3: None}
    found = map_tensors(state, double)
    assert seen == ["a", "b/0", "b/1/1"]
    assert found["b"][1][0] == "text"
    assert isinstance(found["b"][1], tuple)
    assert found[3] is None
    assert torch.equal(found["b"][1][1], torch.full((3,), 2.0))
    assert torch.equal(state["a"], torch.ones(1))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "load"),
        ("builtins", "eval"),
    ],
)
def test_metadata_that_names_a_function_is_refused(sharded_copy, tmp_path, module, name):
    """Even with a matching checksum, and by a dotted path through the imports of an allowed module."""
    forged = (
        b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
        + b"\x93"
    )
    command = f"touch {tmp_path / 'ran'}"
    forged += b"\x8c" + bytes([len(command)]) + command.encode() + b"\x85R."  # (command,), call it
    (sharded_copy / ".metadata").write_bytes(forged)
    digests = json.loads((sharded_copy / "files.json").read_text())
    digests[".metadata"] = hashlib.sha256(forged).hexdigest()
    (sharded_copy / "files.json").write_text(json.dumps(digests))
    refused = rf"not safe to load \(\.metadata: {re.escape(module)}\.{re.escape(name)} is not allowed"
    with pytest.raises(CheckpointError, match=refused):
        AtomicCheckpointIO().load_checkpoint(sharded_copy, weights_only=True)
    assert not (tmp_path / "ran").exists()
