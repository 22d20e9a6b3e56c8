"""Files that are damaged at random are named, or are read with the values they were written with."""

import random
import shutil

import pytest
import torch
from sample_checkpoints import CHECKPOINT, is_checkpoint

import gatera_lightning as gl
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.serialization import CONFIG_FILE, WEIGHTS_FILE
from gatera_lightning.checkpointing.contents import read_contents

COUNT = 150


def damage(path, draw):
    """Damage a file in one of seven ways."""
    content = path.read_bytes()
    position = draw.randrange(len(content))
    end = min(len(content), position + draw.randint(1, 64))
    kinds = {
        "cut off": content[:position],
        "without some bytes": content[:position] + content[end:],
        "with some bytes twice": content[:end] + content[position:],
        "with zeros": content[:position] + bytes(end - position) + content[end:],
        "with other bytes": content[:position] + draw.randbytes(end - position) + content[end:],
        "with a flipped bit": content[:position]
        + bytes([content[position] ^ 1 << draw.randrange(8)])
        + content[position + 1 :],
        "longer": content + draw.randbytes(draw.randint(1, 64)),
    }
    kind = draw.choice(list(kinds))
    path.write_bytes(kinds[kind])
    return kind


@pytest.fixture(scope="module")
def adapted(tiny_llama, tmp_path_factory):
    """An adapted model with its adapter folder."""
    model = tiny_llama()
    gl.inject_adapters(
        model, gl.AdapterConfig(rank=4, target_modules=["q_proj"]), torch.Generator().manual_seed(0)
    )
    return model, gl.save_adapter(model, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_damaged_adapter_folder_is_named_or_has_its_values(adapted, tiny_llama, tmp_path, name):
    model, folder = adapted
    expected = {key: value.detach() for key, value in gl.adapter_parameters(model).items()}
    messages = []
    for number in range(COUNT):
        copy = shutil.copytree(folder, tmp_path / str(number))
        kind = damage(copy / name, random.Random(number))
        fresh = tiny_llama()
        names = set(fresh.state_dict())
        try:
            config = gl.load_adapter(fresh, copy)
        except (gl.AdapterFileError, gl.ConfigError) as error:
            messages.append((str(copy), str(error)))
            assert set(fresh.state_dict()) == names, kind  # the model is as it was
        else:
            assert config == next(iter(adapted_linears(model).values())).config, (number, kind)
            found = gl.adapter_parameters(fresh)
            assert all(torch.equal(found[key], value) for key, value in expected.items()), (number, kind)
    assert all(path in message for path, message in messages)
    assert len(messages) > COUNT / 2


def test_damaged_checkpoint_is_named_or_has_its_values(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "valid.ckpt")
    messages = []
    for number in range(COUNT):
        path = shutil.copy(tmp_path / "valid.ckpt", tmp_path / f"{number}.ckpt")
        kind = damage(tmp_path / f"{number}.ckpt", random.Random(number))
        try:
            found = read_contents(tmp_path / f"{number}.ckpt")
        except gl.CheckpointError as error:
            messages.append((str(path), str(error)))
        else:
            assert is_checkpoint(found), (number, kind)
    assert all(path in message for path, message in messages)
    assert len(messages) > COUNT / 2
