"""Score generated texts against their references, with the work divided among the ranks."""

from typing import Any

from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.evaluation.text_metrics import (
    EXAMPLE_METRICS,
    ExampleScores,
    corpus_metrics,
    example_scores,
)


def score_texts(
    generations: list[dict[str, Any]], *, rank: int, world_size: int, bert_model: str, bert_layer: int
) -> dict[str, str]:
    """Add ``scores`` to the record of every generated text that has a reference; a collective.

    Scores from an earlier run are kept if all texts have them and their library is missing now, or takes
    long (BERTScore). All others are computed, so installing a library later adds its metric without
    generating again.

    Args:
        generations: The generation records of all examples, the same on every rank. Modified in place.
        rank: This rank, which scores every ``world_size``-th text.
        world_size: The number of ranks.
        bert_model: The model of BERTScore.
        bert_layer: The layer of that model.

    Returns:
        The metrics that could not be computed, and why.
    """
    texts = [generation for generation in generations if "reference" in generation]
    if not texts:
        return {}
    stored = [name for name in EXAMPLE_METRICS if all(name in text.get("scores", ()) for text in texts)]
    share = texts[rank::world_size]
    own = example_scores(
        [text["text"] for text in share],
        [text["reference"] for text in share],
        known=[name for name in stored if name.startswith("bert_score")],
        bert_model=bert_model,
        bert_layer=bert_layer,
    )
    parts: list[ExampleScores] = gather_objects(own)
    # A metric that failed on one rank is missing for a part of the texts, so it is left out.
    computed = [name for name in EXAMPLE_METRICS if all(name in part.values for part in parts)]
    names = [name for name in EXAMPLE_METRICS if name in computed or name in stored]
    for part_rank, part in enumerate(parts):
        for number, text in enumerate(texts[part_rank :: len(parts)]):
            text["scores"] = {
                name: part.values[name][number] if name in computed else text["scores"][name]
                for name in names
            }
    skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
    return skipped | corpus_metrics([], [])[1]
