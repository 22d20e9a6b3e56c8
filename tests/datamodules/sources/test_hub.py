"""Rows of hub data sets: what is asked of the hub, and what an error says."""

import pytest

from gatera_lightning.datamodules.sources.hub import read_hub_rows
from gatera_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("location", "requested"),
    [
        ("owner/name", ("owner/name", None, "validation")),
        ("owner/name:en", ("owner/name", "en", "validation")),
        ("owner/name@dev", ("owner/name", None, "dev")),
        ("owner/name:en@dev", ("owner/name", "en", "dev")),
        ("owner/name:en-1.0@dev[:10%]", ("owner/name", "en-1.0", "dev[:10%]")),
    ],
)
def test_read_hub_rows_passes_configuration_and_split(location, requested, fake_hub):
    fake_hub.rows = [{"a": 1}, {"a": 2}]
    rows = list(read_hub_rows(location, "validation"))
    assert fake_hub.requests == [requested]
    dataset, _, split = requested
    assert rows == [(f"{dataset}[{split}], row {number}", {"a": number}) for number in (1, 2)]


def test_hub_datasets_are_named_and_sliced_in_data_module(make_instruction_data, fake_hub):
    row = {"question": "Why?", "answer": "So."}
    fake_hub.rows = [row, row, {}]
    data = make_instruction_data(
        train=["owner/chats:en@dev[:2]", "owner/others[:1]"],
        weights={"chats": 1, "others": 3},
        columns={"instruction": "question", "output": "answer"},
        validation=1,
    )
    assert data.problems("fit") == []
    assert [example.task for example in data.examples("train")] == ["chats", "chats", "others"]
    assert fake_hub.requests == [("owner/chats", "en", "dev"), ("owner/others", None, "train")]
    data.sources["train"] = ["owner/chats:en@dev"]
    with pytest.raises(ConfigError, match=r"^owner/chats\[dev\], row 3: column 'question' is missing"):
        list(data.examples("train"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError(), "ConnectionError: "),
        (ConnectionError("\nno route"), "ConnectionError: no route"),
        (OSError("no route\nmore"), "OSError: no route more"),
        (
            ValueError("Config name is missing.\nPick one of 'en'"),
            "ValueError: Config name is missing. Pick one of 'en'",
        ),
    ],
)
def test_hub_error_explains_alternatives(error, reason, fake_hub):
    fake_hub.error = error
    with pytest.raises(ConfigError) as caught:
        list(read_hub_rows("owner/name@dev", "train"))
    message = str(caught.value)
    assert message.startswith(f"data.train: cannot fetch 'owner/name@dev' from the hub ({reason}). Write ")
    assert (
        "owner/name:configuration to choose a configuration and owner/name@split to choose another" in message
    )
    assert message.endswith("Without network access, use local files.")


def test_setup_without_network_names_the_hub_dataset(make_data):
    data = make_data(train=["zwhe99/commonsense_170k[:10]"], validation=1)
    assert data.problems("fit") == []  # without asking the hub
    with pytest.raises(
        ConfigError, match=r"^data\.train: cannot fetch 'zwhe99/commonsense_170k' from the hub \("
    ):
        data.setup("fit")
