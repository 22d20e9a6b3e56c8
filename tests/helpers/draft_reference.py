"""Draft rows computed the slow way: [draft rows | clean rows] as one sequence, with a mask built by loops."""

from contextlib import contextmanager

import torch

from gatera_lightning.datamodules.batch import IGNORE_INDEX

SIZE, VOCABULARY = 3, 128


def make_batch():
    """Three sequences: a padded one, one with a gap between its responses, and one without a response."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 12), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 9:] = 0
    labels[0, 9:] = labels[0, :4] = labels[1, :1] = labels[1, 5:7] = labels[2] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def blocks_of(labels, offset):
    """The blocks of a sequence, each a list of columns, by counting."""
    blocks, count = [], 0
    for column, label in enumerate(labels.tolist()):
        if label == IGNORE_INDEX:
            count = 0
            continue
        if count == 0 or (count + offset) % SIZE == 0:
            blocks.append([])
        blocks[-1].append(column)
        count += 1
    return blocks


def paired_inputs(blocks, length):
    """The positions and the attention mask of [draft rows | clean rows], as the model takes them."""
    columns = [column for block in blocks for column in block]
    block_of = {column: block for block in blocks for column in block}
    n = len(columns)
    visible = torch.zeros(n + length, n + length, dtype=torch.bool)
    for i, column in enumerate(columns):
        for j, other in enumerate(columns):
            visible[i, j] = block_of[other] is block_of[column] and other <= column
        visible[i, n : n + block_of[column][0]] = True  # clean rows before the block
    for i in range(length):
        visible[n + i, n : n + i + 1] = True
    hidden = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e300)
    return {
        "position_ids": torch.tensor([columns + list(range(length))]),
        "attention_mask": hidden[None, None],
        "use_cache": False,
    }


@contextmanager
def lora_on_first_rows(model, factors, scale, n):
    """Inside, add a LoRA, given by the names of its factors, to the first n rows of a plain model."""

    def hook_of(name):
        a, b = factors[f"{name}.update.a"], factors[f"{name}.update.b"]

        def add(_, args, y):
            drafts = (torch.arange(y.shape[1]) < n).double().view(1, -1, 1)
            return y + drafts * scale * (args[0] @ a.T @ b.T)

        return add

    hooks = [
        layer.register_forward_hook(hook_of(name))
        for name, layer in model.named_modules()
        if f"{name}.update.a" in factors
    ]
    yield
    for hook in hooks:
        hook.remove()
