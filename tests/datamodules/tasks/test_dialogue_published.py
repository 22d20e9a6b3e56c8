"""Dialogues of ConvAI2: personas are not divided, and stay in truncated prompts."""

import pytest

from gatera_lightning.datamodules.tasks.convai2_files import read_parlai
from gatera_lightning.datamodules.tasks.personas import persona_ids

SOURCE = "$GATERA_DATA/dialogue/convai2/valid_self_original.shared.txt"


@pytest.fixture(scope="module")
def dialogues(published_data):
    return list(read_parlai(str(published_data / "dialogue/convai2/valid_self_original.shared.txt")))


@pytest.mark.slow
def test_personas_of_convai2_are_not_divided(dialogues, make_dialogue_data):
    """702 dialogues of 68 personas with 5 to 10 sentences each, of which a dialogue shows 4 or 5."""
    ids = persona_ids([dialogue.persona for dialogue in dialogues])
    assert set(ids) == set(range(68))
    sentences = [set[str]() for _ in range(68)]
    for dialogue, persona in zip(dialogues, ids, strict=True):
        sentences[persona].update(dialogue.persona)
    assert {len(found) for found in sentences} == set(range(5, 11))

    settings = {"split_by": "persona", "max_history_turns": 0, "validation": 120}
    data = make_dialogue_data(train=[f"{SOURCE}[:66]"], test=[f"{SOURCE}[66:]"], **settings)
    groups = {split: [example.group for example in data.examples(split)] for split in ("train", "test")}
    assert (len(set(groups["train"])), len(set(groups["test"]))) == (66, 2)
    assert len(groups["train"]) + len(groups["test"]) == 5466
    data.setup("fit")
    assert 120 <= len(data.tables["validation"]) < 240
    assert [overlap.indices for overlap in data.overlaps()[2:]] == [(), ()]


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_prompts_of_convai2_keep_their_personas(template, dialogues, make_dialogue_data, smollm2):
    settings = {"max_length": 144, "template": template, "tokenizer": smollm2}
    table = make_dialogue_data(test=[f"{SOURCE}[:12]"], **settings, stage="test").tables["test"]
    assert not any(table["truncated"])
    assert max(map(max, table["lengths"])) <= 144
    assert {len(labels) for labels in table["labels"]} == {20}
    personas = [" ".join(dialogue.persona) for dialogue in dialogues[:12] for _ in dialogue.turns]
    texts = smollm2.batch_decode(table["prompt"][:])
    assert all(persona in text for persona, text in zip(personas, texts, strict=True))
