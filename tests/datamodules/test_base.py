"""SupervisedDataModule: its tokenizer, its settings, and tasks that subclass it."""

import pytest

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.example import Example

def test_another_tokenizer_replaces_open_tables(make_all, tokenizers_by_kind):
    """One data module used for two backbones must not feed the second one the first one's ids."""
    (module,) = make_all(3, stage="test")
    module.connect(tokenizers_by_kind["pieces"])
    module.setup("test")
    (fresh,) = make_all(3, stage="test", tokenizer=tokenizers_by_kind["pieces"])
    assert module.tables["test"]["prompt"][:] == fresh.tables["test"]["prompt"][:]


def test_no_tokenizer(make_data):
    module = make_data()
    module.connect(None)
    with pytest.raises(RuntimeError, match=r"call connect\(tokenizer\) first"):
        module.setup("fit")


def test_a_family_must_give_examples():
    with pytest.raises(TypeError, match=r"abstract.*examples"):
        SupervisedDataModule()


class _Capitals(SupervisedDataModule):
    """A family of its own, with nothing but examples."""

    def examples(self, split):
        yield Example("What is the capital of France?\nAnswer:", [" Lyon", " Paris"], 1, "capitals")


def test_a_family_that_says_nothing_about_labels_is_read_by_its_answers(tokenizer):
    data = _Capitals(train_on="response", evaluate_by=["likelihood", "generation"])
    assert data.problems("test") == []
    data.connect(tokenizer)
    data.setup("test")
    (row,) = data.tables["test"]
    assert row["labels"] == [" Lyon", " Paris"]
    texts = (" paris.\nOr Lyon", "Lyon", "Nice", "")
    assert [data.parse_answer(text, row["labels"]).choice for text in texts] == [1, 0, None, None]
