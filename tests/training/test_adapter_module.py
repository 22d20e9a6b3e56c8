"""``freeze`` and ``unfreeze`` concern the adapter alone."""

from gatera_lightning import adapter_parameters


def trainable(module):
    return {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}


def test_unfreeze_leaves_the_backbone_frozen(build):
    module = build()
    expected = set(adapter_parameters(module.model))
    module.unfreeze()
    assert trainable(module) == expected
    module.freeze()
    assert trainable(module) == set()
    assert module.unfreeze() is module
    assert trainable(module) == expected
    assert module.training
