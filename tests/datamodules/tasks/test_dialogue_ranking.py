"""hits@1 of ranked replies, compared with a computation that does not use the data module."""

import math
from importlib import resources
from pathlib import Path

import pytest
import torch
from tiny_backbone import tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import BackboneConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules import DialogueDataModule

SAMPLE = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "smalltalk" / "test.txt"


def test_hits_at_1_and_loss(tiny_backbone, tmp_path):
    """Five dialogues of the sample; the reference reads the file and scores one candidate per forward."""
    data = DialogueDataModule(
        template="plain", train_on="response", test=["smalltalk[:5]"], max_length=512, eval_batch_size=40
    )
    data.connect(load_tokenizer(BackboneConfig(id=str(tiny_backbone))))
    report = EvaluationReport(str(tmp_path))
    tiny_trainer(tmp_path, report).test(tiny_module(tiny_backbone), datamodule=data, verbose=False)
    examples = sorted(report.result.examples, key=lambda example: example["example"])
    assert len(examples) == 20

    model = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    prompt, persona, hits, loss_sum, tokens = "", [], 0, 0.0, 0
    for line in SAMPLE.read_text().splitlines():
        text = line.partition(" ")[2]
        if line.startswith("1 "):
            persona, prompt = [], ""
        if text.startswith("your persona: "):
            persona.append(text.removeprefix("your persona: "))
            continue
        if not examples:
            break
        partner, reply, _, candidates = text.split("\t")
        prompt = (prompt or f"Persona: {' '.join(persona)}") + f"\nPartner: {partner}\nYou:"
        start = len(tokenizer(prompt).input_ids)
        scores = []
        for candidate in candidates.split("|"):
            ids = [*tokenizer(f"{prompt} {candidate}").input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
        loss_sum, tokens = loss_sum - scores[-1], tokens + len(ids) - start
        example = examples.pop(0)
        assert example["likelihood"]["log_likelihoods"] == pytest.approx(scores, rel=1e-4)
        assert example["gold"] == 19
        hits += scores.index(max(scores)) == 19
        prompt += f" {reply}"
    assert report.result.accuracy("sum").value == hits / 20
    assert math.exp(report.result.gold_loss) == pytest.approx(math.exp(loss_sum / tokens), rel=1e-4)
