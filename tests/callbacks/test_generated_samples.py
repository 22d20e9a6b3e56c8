"""Tests of GeneratedSamples: responses match plain greedy decoding, and training does not change."""

import html
import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_tokenizer, tiny_trainer
from tokenizers.processors import TemplateProcessing

from gatera_lightning import adapter_parameters
from gatera_lightning.callbacks import generated_samples
from gatera_lightning.callbacks.gate_heatmap import GateHeatmap
from gatera_lightning.callbacks.generated_samples import GeneratedSamples, Sample, sample_html
from gatera_lightning.gate_analysis.probing import ProbeText, profile_gates


class CheckedSamples(GeneratedSamples):
    """Also computes the gates of its samples in one forward each, and the responses in a plain loop."""

    def _generate(self, pl_module, tokenizer):
        before = {name: module.training for name, module in pl_module.named_modules()}
        self.found = super()._generate(pl_module, tokenizer)
        assert {name: module.training for name, module in pl_module.named_modules()} == before
        model = pl_module.model
        texts = [ProbeText("", sample.token_ids, sample.prompt_length) for sample in self.found]
        self.expected_gates = (
            [gates.mean(0) for gates in profile_gates(model, texts).gates]
            if self.found[0].gates is not None
            else None
        )
        self.greedy = []
        for prompt in self._prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + self.max_new_tokens:
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
            self.greedy.append(ids)
        return self.found


def fit(backbone, root, *callbacks, logger=False, **adapter):
    module = tiny_module(backbone, **({"dropout": 0.2} | adapter))
    trainer = tiny_trainer(
        root, *callbacks, logger=logger, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=1
    )
    torch.manual_seed(0)
    trainer.fit(module, datamodule=tiny_data(backbone))
    return module


def read_logged(folder):
    events = EventAccumulator(folder, size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    texts = {
        tag: {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)} for tag in tags
    }
    return texts, {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}


def test_samples_are_logged_after_every_validation(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callback = CheckedSamples(2, max_new_tokens=7)
    fit(tiny_backbone, tmp_path, callback, logger=logger)
    texts, pictures = read_logged(logger.log_dir)
    assert pictures == {"samples/1": [2, 4], "samples/2": [2, 4]}
    assert [sample.token_ids for sample in callback.found] == callback.greedy
    for sample, gates in zip(callback.found, callback.expected_gates, strict=True):
        assert np.abs(sample.gates - gates).max() < 1e-6
    for number, question in enumerate(map(PlainQuestion.of, sample_rows("validation")[:2]), 1):
        by_step = texts[f"samples/{number}/text_summary"]
        assert list(by_step) == [2, 4]
        assert by_step[4].startswith(
            f"<blockquote>{html.escape(question.prompt).replace(chr(10), '<br>')}</blockquote><p>"
        )


def test_samples_end_at_end_token(tiny_backbone, tmp_path, monkeypatch):
    """Some responses of the batch end at an end token, while others continue."""
    prompts = ["What do bees make?", "I ride", "12 - 5 =", "Why?", "two dogs run", "A boat"]
    logger = TensorBoardLogger(tmp_path)
    callback = CheckedSamples(prompts, max_new_tokens=7)
    fit(tiny_backbone, tmp_path, callback, logger=logger)
    complete = [
        (sample.token_ids[: sample.prompt_length], sample.token_ids[sample.prompt_length :])
        for sample in callback.found
    ]
    rows = Counter(token for _, response in complete for token in set(response))
    ending = next(token for token, count in rows.items() if count < len(complete))
    ends = generated_samples.end_tokens
    for module in ("gatera_lightning.generation.decoding", "gatera_lightning.callbacks.generated_samples"):
        monkeypatch.setattr(f"{module}.end_tokens", lambda *args: [*ends(*args), ending])
    callback = CheckedSamples(prompts, max_new_tokens=7)
    fit(tiny_backbone, tmp_path, callback, logger=logger)
    cut = [
        prompt + list(itertools.takewhile(lambda token: token != ending, response))
        for prompt, response in complete
    ]
    assert [sample.token_ids for sample in callback.found] == cut
    for sample, gates in zip(callback.found, callback.expected_gates, strict=True):
        assert np.abs(sample.gates - gates).max() < 1e-6


def test_samples_do_not_change_training(tiny_backbone, tmp_path):
    with_samples = fit(
        tiny_backbone, tmp_path / "with", GeneratedSamples(), logger=TensorBoardLogger(tmp_path)
    )
    state = torch.get_rng_state()
    without = fit(tiny_backbone, tmp_path / "without")
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in adapter_parameters(with_samples.model).items():
        assert torch.equal(parameter, adapter_parameters(without.model)[name])


def test_no_samples_for_validation_outside_of_training(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module, data = tiny_module(tiny_backbone), tiny_data(tiny_backbone)
    trainer = tiny_trainer(
        tmp_path, GeneratedSamples(1), logger=logger, limit_val_batches=1, max_steps=2, val_check_interval=2
    )
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    assert read_logged(logger.log_dir)[1] == {"samples/1": [2]}


@pytest.mark.parametrize("gate", ["static", "none"])
def test_without_token_gates_only_text_is_logged(tiny_backbone, tmp_path, gate):
    logger = TensorBoardLogger(tmp_path)
    callback = CheckedSamples(1, max_new_tokens=5)
    fit(tiny_backbone, tmp_path, callback, logger=logger, gate=gate)
    texts, pictures = read_logged(logger.log_dir)
    assert callback.found[0].token_ids == callback.greedy[0]
    assert list(texts) == ["samples/1/text_summary"]
    assert "<strong>" not in texts["samples/1/text_summary"][4]
    assert pictures == {}


def test_other_loggers_cause_one_warning(tiny_backbone, tmp_path, caplog):
    fit(tiny_backbone, tmp_path, GeneratedSamples(), logger=CSVLogger(tmp_path))
    assert caplog.text.count("generated samples need the TensorBoard logger") == 1


def test_failing_generation_ends_samples_but_not_run(tiny_backbone, tmp_path, monkeypatch, caplog):
    asked = []

    def fail(*_, **__):
        asked.append(1)
        raise AttributeError("this state\nhas no get_seq_length")

    monkeypatch.setattr(generated_samples, "generate", fail)
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, GeneratedSamples(2), logger=logger)
    assert read_logged(logger.log_dir) == ({}, {})
    message = "LlamaForCausalLM failed to generate (AttributeError: this state has no get_seq_length)"
    assert caplog.text.count(message) == len(asked) == 1


def test_prompt_does_not_end_with_tokenizer_end_token(tiny_backbone, tmp_path):
    data, callback, heatmap = (
        tiny_data(tiny_backbone),
        CheckedSamples(["Why?"], max_new_tokens=3),
        GateHeatmap(4, ["Why?"]),
    )
    ids, backend = data.tokenizer("Why?").input_ids, data.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", data.tokenizer.eos_token_id)]
    )
    assert data.tokenizer("Why?").input_ids == [*ids, data.tokenizer.eos_token_id]
    trainer = tiny_trainer(
        tmp_path,
        callback,
        heatmap,
        logger=TensorBoardLogger(tmp_path),
        limit_val_batches=1,
        val_check_interval=2,
    )
    trainer.fit(tiny_module(tiny_backbone), datamodule=data)
    assert callback.found[0].token_ids[: callback.found[0].prompt_length] == ids
    assert [probe.token_ids for probe in heatmap._probes] == [ids]


def test_no_samples_if_turned_off(tiny_backbone, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, GeneratedSamples(0), logger=logger)
    assert read_logged(logger.log_dir) == ({}, {})


def test_prompt_without_room_for_response_is_skipped(tiny_backbone, tmp_path, caplog):
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_backbone, tmp_path, GeneratedSamples(["Why?", "a b " * 300], max_new_tokens=100), logger=logger)
    assert (
        "skipped 1 of 2 prompts, which are longer than 412 tokens (the model's context minus max_new_tokens"
        in caplog.text
    )
    assert list(read_logged(logger.log_dir)[1]) == ["samples/1"]


def test_sample_html_survives_tensorboard():
    tokenizer = tiny_tokenizer()
    ids = [i for c in ["a <b>", "c", "*d*\n\n_e_", "🐝"] for i in tokenizer(c).input_ids]
    starts = np.cumsum([len(tokenizer(c).input_ids) for c in ["a <b>", "c", "*d*\n\n_e_", "🐝"]])
    gates = np.where(np.arange(len(ids)) < starts[1], 0.9, 0.1)
    gates[starts[2] :] = 0.7
    shown = markdown_to_safe_html(sample_html(Sample(ids, int(starts[0]), gates), tokenizer))
    expected = (
        "<blockquote>a &lt;b&gt;</blockquote><p><strong>c</strong>*d*<br><br>_e_<strong>🐝</strong></p>"
    )
    assert re.sub(r"\n", "", shown).replace("<br/>", "<br>") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompts": -1},
            r"generated_samples\.prompts: -1; accepted: 0, a number of examples, or texts, none of them",
        ),
        (
            {"prompts": ["a", " "]},
            r"generated_samples\.prompts: \['a', ' '\]; accepted: 0, a number of examples, or texts",
        ),
        ({"prompts": True}, r"generated_samples\.prompts: True; accepted: 0, a number of examples"),
        ({"max_new_tokens": 0}, r"generated_samples\.max_new_tokens: 0; accepted: an integer of at least 1"),
    ],
)
def test_invalid_arguments_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneratedSamples(**settings)
