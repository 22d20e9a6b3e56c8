"""Two ranks predict each of an odd number of questions once, and write the same file as one process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_backbone import run_program, tiny_args, tiny_module
from transformers import AutoTokenizer

from gatera_lightning import adapter_parameters, save_adapter
from gatera_lightning.cli.main import main

ROWS = 7
REPLIES, CANDIDATES = 8, 20  # of smalltalk's first two conversations
TWO = {
    "ddp": ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
    "fsdp": ["--config", "overlays/fsdp.yaml", "--trainer.devices", "2"],
}


@pytest.fixture(scope="module")
def learned(tiny_backbone, tmp_path_factory):
    """A backbone and an adapter whose answers have very different lengths: sharded ranks must wait.

    It prefers words that occur in replies, so that texts get different scores.
    """
    root = tmp_path_factory.mktemp("learned")
    backbone = shutil.copytree(tiny_backbone, root / "backbone")
    weights = load_file(backbone / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    weights["lm_head.weight"][tokenizer.eos_token_id] *= 20
    weights["lm_head.weight"][tokenizer.convert_tokens_to_ids(["Ġi", "Ġa", "Ġin", "Ġis", "Ġyou"])] *= 10
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    module = tiny_module(backbone)
    module.configure_model()
    with torch.no_grad():
        for parameter in adapter_parameters(module.model).values():
            parameter.add_(
                4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return backbone, save_adapter(module.model, root / "adapter")


def evaluated_by_one(learned, root, config, test, batch):
    """Arguments that evaluate by likelihood and generation, and the folder in which one process did so."""
    backbone, adapter = learned
    args = ["test", "--config", config, *tiny_args(backbone), "--model.warm_start", str(adapter)]
    args += ["--data.init_args.test", test, "--data.init_args.eval_batch_size", str(batch)]
    args += [
        "--data.init_args.evaluate_by",
        "[likelihood, generation]",
        "--model.decoding.max_new_tokens",
        "12",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*args, "--evaluation.folder", str(root / "folder")]) == 0
    return args, root / "folder"


@pytest.fixture(scope="module")
def one(learned, tmp_path_factory):
    return evaluated_by_one(
        learned, tmp_path_factory.mktemp("one"), "quickstart.yaml", f'["everyday[:{ROWS}]"]', 2
    )


@pytest.fixture(scope="module")
def one_dialogue(learned, tmp_path_factory):
    """Eight replies with twenty candidates each: three batches to rank and one to generate, both odd."""
    return evaluated_by_one(
        learned,
        tmp_path_factory.mktemp("dialogue"),
        "smollm2_dialogue.yaml",
        '["smalltalk[:2]"]',
        3 * CANDIDATES,
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TWO)
def test_two_ranks_write_the_predictions_of_one_process(one, tmp_path, strategy):
    args, reference = one
    folder = tmp_path / "folder"
    run_program(*args, *TWO[strategy], "--evaluation.folder", str(folder), cwd=tmp_path, timeout=120)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["example"] for line in lines] == list(range(ROWS))
    assert all({"likelihood", "generation"} <= set(line) for line in lines)
    texts = {line["generation"]["text"] for line in lines}
    assert "" in texts
    assert len(texts) > 2
    assert (folder / "predictions.jsonl").read_bytes() == (reference / "predictions.jsonl").read_bytes()
    assert list(folder.glob("part-*")) == []
    found, expected = (json.loads((path / "test_results.json").read_text()) for path in (folder, reference))
    same = ("rows", "rows_of_split", "tasks", "average", "nats_per_target_token", "identity")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert (found["resumed_predictions"], found["computed_predictions"]) == (0, 2 * ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TWO)
def test_two_ranks_evaluate_dialogue_as_one_process(one_dialogue, tmp_path, strategy):
    """Candidates share the forward pass of their prompt, and each rank scores a share of the texts."""
    args, reference = one_dialogue
    folder = tmp_path / "folder"
    run_program(*args, *TWO[strategy], "--evaluation.folder", str(folder), cwd=tmp_path, timeout=120)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]
    assert [line["example"] for line in lines] == list(range(REPLIES))
    assert [len(line["likelihood"]["tokens"]) for line in lines] == [CANDIDATES] * REPLIES
    assert all({"token_f1", "rouge_l"} <= set(line["generation"]["scores"]) for line in lines)
    assert (
        len({line["generation"]["scores"]["token_f1"] for line in lines}) > 2
    )  # otherwise swapped texts would go unnoticed
    assert (folder / "predictions.jsonl").read_bytes() == (reference / "predictions.jsonl").read_bytes()
    found, expected = (json.loads((path / "test_results.json").read_text()) for path in (folder, reference))
    same = (
        "rows",
        "tasks",
        "average",
        "nats_per_target_token",
        "perplexity",
        "text",
        "text_skipped",
        "identity",
    )
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert set(found["text"]) >= {"token_f1", "rouge_l", "distinct_1", "distinct_2"}
    assert (found["resumed_predictions"], found["computed_predictions"]) == (0, 2 * REPLIES)
