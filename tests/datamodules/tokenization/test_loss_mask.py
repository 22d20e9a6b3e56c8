"""Which tokens are supervised, by hand."""

import pytest

from gatera_lightning.datamodules.tokenization.loss_mask import supervised_ranges


@pytest.mark.parametrize(
    ("prompt", "length", "earlier", "train_on", "expected"),
    [
        (3, 5, [], "response", [(3, 5)]),
        (3, 5, [(1, 2)], "response", [(3, 5)]),
        (3, 5, [], "every_response", [(3, 5)]),
        (9, 12, [(2, 4), (6, 7)], "every_response", [(2, 4), (6, 7), (9, 12)]),
        (9, 12, [[0, 4]], "every_response", [(1, 4), (9, 12)]),  # the first token has no predecessor
        (9, 12, [(2, 4)], "all", [(1, 12)]),
        (0, 3, [], "response", [(1, 3)]),
        (0, 3, [], "every_response", [(1, 3)]),
        (0, 3, [], "all", [(1, 3)]),
    ],
)
def test_supervised_ranges(prompt, length, earlier, train_on, expected):
    assert supervised_ranges(prompt, length, earlier, train_on) == expected
