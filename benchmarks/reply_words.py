"""Perplexity of a dialogue recipe's test replies, with the token that ends a reply and without it.

GATERA_DATA=… python benchmarks/reply_words.py --adapter results/dialogue/gatera-0-adapter --config smollm2_dialogue.yaml
"""

import argparse
import math

import torch

from gatera_lightning import load_adapter
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.commands.preview import PreviewedSplit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", help="an adapter folder; default: the untrained model")
    own, rest = parser.parse_known_args()
    recipe = PreviewedSplit(["fit", *rest], "test")
    model = load_backbone(recipe.model.backbone, "cpu")
    if own.adapter is not None:
        load_adapter(model, own.adapter)
    model.eval()
    nats, tokens = torch.zeros(2, dtype=torch.float64), torch.zeros(2)  # with the end, without it
    for row in recipe.table.examples:
        prompt, reply = list(row["prompt"]), list(row["answers"][row["gold"]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(reply), reduction="none").double()
        nats += torch.stack([losses.sum(), losses[:-1].sum()])
        tokens += torch.tensor([len(reply), len(reply) - 1])
    for name, sum_of_nats, count in zip(
        ("with its end", "without"), nats.tolist(), tokens.tolist(), strict=True
    ):
        print(
            f"{name}: {sum_of_nats:.0f} nats, {count:.0f} tokens, perplexity {math.exp(sum_of_nats / count):.2f}"
        )


if __name__ == "__main__":
    main()
