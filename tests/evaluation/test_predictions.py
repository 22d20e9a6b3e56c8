"""Predictions on disk: a run that is killed, whenever, ends with the very file of one that was not; nothing is mixed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_backbone import run_program, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning import ConfigError, adapter_parameters, save_adapter
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.cli.main import main
from gatera_lightning.evaluation.likelihood_ranking import RankedQuestion
from gatera_lightning.evaluation.identity import FORMAT_VERSION
from gatera_lightning.evaluation.prediction_files import (
    PREDICTIONS_FILE,
    PartFile,
    delete_predictions,
    read_records,
    write_predictions,
)
from gatera_lightning.evaluation.predictions import (
    GeneratedAnswer,
    TextWithReference,
    generation_record,
    likelihood_record,
)
from gatera_lightning.generation.decoding import DecodingConfig

ROWS = 7
BOTH = ["likelihood", "generation"]


def build(folder, **adapter):
    """A module whose adapter has learned something."""
    module = tiny_module(folder, **adapter)
    module.decoding = DecodingConfig(max_new_tokens=4)
    module.configure_model()
    with torch.no_grad():
        for parameter in adapter_parameters(module.model).values():
            parameter.add_(
                4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return module


@pytest.fixture(scope="module")
def module(tiny_backbone):
    return build(tiny_backbone)


class Killed(Exception):
    pass


class Killer(L.Callback):
    """Dies when ``at`` batches are on disk, and says which examples were computed."""

    def __init__(self, at=None):
        self.at, self.batches, self.computed = at, 0, []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        kind = "likelihood" if "labels" in batch else "generation"
        computed = [
            (kind, example) for example in dict.fromkeys(batch["example_ids"].tolist()) if example >= 0
        ]
        if computed and self.batches == self.at:
            raise Killed
        self.batches += bool(computed)
        self.computed += computed

    def on_test_epoch_end(self, trainer, pl_module):
        if self.batches == self.at:
            raise Killed

    on_predict_batch_end = on_test_batch_end


def evaluate(module, folder, at=None, verb="test", rows=ROWS, evaluate_by=BOTH, root=None, **settings):
    """One run of its own on a folder; the Killer with what it saw."""
    killer = Killer(at)
    trainer = tiny_trainer(root or folder, killer, EvaluationReport(None if folder is None else str(folder)))
    data = tiny_data(
        module.backbone.id,
        test=[f"everyday[:{rows}]"],
        evaluate_by=evaluate_by,
        eval_batch_size=6,
        **settings,
    )
    options = {"verbose": False} if verb == "test" else {}
    getattr(trainer, verb)(module, datamodule=data, **options)
    return killer


def content(folder):
    assert list(folder.glob("part-*")) == list(folder.glob("*.tmp")) == []
    return (folder / PREDICTIONS_FILE).read_bytes()


@pytest.fixture(scope="module")
def whole(module, tmp_path_factory):
    """The folder of an uninterrupted run, and what the run computed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(module, folder)


EVERYTHING = [(kind, example) for kind in BOTH for example in range(ROWS)]


def test_one_line_a_question_with_all_that_was_found(whole):
    folder, killer = whole
    assert sorted(killer.computed) == sorted(EVERYTHING)
    assert killer.batches > 5
    rows = [json.loads(line) for line in content(folder).splitlines()]
    assert [row["example"] for row in rows] == list(range(ROWS))
    for row in rows:
        assert list(row) == ["task", "example", "key", "gold", "likelihood", "generation"]
        assert (row["task"], len(row["key"])) == ("everyday", 16)
        assert list(row["likelihood"]) == ["log_likelihoods", "tokens", "characters", "choice"]
        assert list(row["likelihood"]["choice"]) == ["sum", "per_token", "per_character"]
        assert list(row["generation"]) == ["text", "answer", "choice"]
    assert len({row["generation"]["text"] for row in rows}) > 3  # else a mix-up would not show
    assert len({row["key"] for row in rows}) == ROWS


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_nothing_is_computed_twice(whole, module, tmp_path, verb):
    folder = shutil.copytree(whole[0], tmp_path / "again")
    forwards = []
    handle = module.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    killer = evaluate(module, folder, verb=verb)
    handle.remove()
    assert killer.computed == []
    assert (
        len(forwards) <= 2 * 4
    )  # a row that counts for nothing keeps Lightning's loop going: 1 forward, 4 new tokens
    assert content(folder) == content(whole[0])


@pytest.mark.parametrize(
    "torn", ["", '[["likelihood", 3, {"log_like'], ids=["cut between lines", "torn line"]
)
def test_a_run_killed_after_any_batch_ends_with_the_same_file(whole, module, tmp_path, torn):
    for at in range(whole[1].batches + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            evaluate(module, folder, at)
        (part,) = folder.glob("part-*")
        with part.open("a") as file:
            file.write(torn)
        on_disk = set(read_records(folder))
        killer = evaluate(module, folder)
        assert len(killer.computed) == len(EVERYTHING) - len(on_disk)
        assert set(killer.computed) | on_disk == set(EVERYTHING)
        assert content(folder) == content(whole[0])


def test_killed_again_and_again(whole, module, tmp_path):
    for _ in range(whole[1].batches):
        with pytest.raises(Killed):
            evaluate(module, tmp_path, at=1)
    assert len(list(tmp_path.glob("part-*"))) == whole[1].batches
    assert evaluate(module, tmp_path).computed == []
    assert content(tmp_path) == content(whole[0])


@pytest.mark.parametrize("first", [0, 1])
def test_batches_that_another_process_did_not_finish_are_computed_as_they_were_cut(
    whole, module, tmp_path, first
):
    """Of two killed processes one may have been ahead; filling batches up again would round otherwise."""
    with pytest.raises(Killed):
        evaluate(module, tmp_path, at=whole[1].batches)
    (part,) = tmp_path.glob("part-*")
    lines = part.read_text().splitlines(keepends=True)
    part.unlink()
    (tmp_path / "part-1-0.jsonl").write_text("".join(lines[first::2]))
    killer = evaluate(module, tmp_path)
    assert killer.batches == len(lines) - len(lines[first::2])
    assert content(tmp_path) == content(whole[0])


def test_a_file_that_was_merged_but_whose_parts_are_left_is_read_once(whole, module, tmp_path):
    with pytest.raises(Killed):
        evaluate(module, tmp_path, at=whole[1].batches)
    shutil.copy(whole[0] / PREDICTIONS_FILE, tmp_path)
    assert evaluate(module, tmp_path).computed == []
    assert content(tmp_path) == content(whole[0])


def test_another_way_of_evaluating_is_added(whole, module, tmp_path):
    evaluate(module, tmp_path, evaluate_by=["likelihood"])
    assert all("generation" not in json.loads(line) for line in content(tmp_path).splitlines())
    killer = evaluate(module, tmp_path)
    assert sorted(killer.computed) == [("generation", example) for example in range(ROWS)]
    assert content(tmp_path) == content(whole[0])
    evaluate(module, tmp_path, evaluate_by=["likelihood"])
    assert content(tmp_path) == content(whole[0])  # what is there is kept


def test_without_a_folder_the_log_folder_is_started_anew(whole, module, tmp_path):
    evaluate(module, None, root=tmp_path)
    assert content(tmp_path) == content(whole[0])
    with pytest.raises(Killed):
        evaluate(module, None, at=2, root=tmp_path)
    killer = evaluate(module, None, root=tmp_path, rows=4)
    assert sorted(killer.computed) == [(kind, example) for kind in sorted(BOTH) for example in range(4)]
    assert len(content(tmp_path).splitlines()) == 4


# --- nothing is mixed ---


def moved_by_a_hair(folder):
    module = build(folder)
    with torch.no_grad():
        next(iter(adapter_parameters(module.model).values()))[0, 0] += 1e-6
    return module


def of_another_backbone(folder, path):
    """The same but for one of its matrices."""
    other = shutil.copytree(folder, path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return build(other)


@pytest.mark.parametrize("state", ["complete", "killed"])
@pytest.mark.parametrize("differs", ["adapter", "backbone", "data", "dtype", "decoding"])
def test_another_evaluation_is_refused_before_anything_is_computed(
    whole, tiny_backbone, tmp_path, capfd, differs, state
):
    folder = shutil.copytree(whole[0], tmp_path / "folder")
    if state == "killed":
        (folder / PREDICTIONS_FILE).unlink()
        (folder / "part-0-0.jsonl").write_text(
            '[["generation", 0, {"text": "", "answer": null, "choice": null}]]\n'
        )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    module = build(tiny_backbone)
    if differs == "adapter":
        module = moved_by_a_hair(tiny_backbone)
    elif differs == "backbone":
        module = of_another_backbone(tiny_backbone, tmp_path)
    elif differs == "dtype":
        module.model.get_input_embeddings().double()
    elif differs == "decoding":
        module.decoding = DecodingConfig(max_new_tokens=5)
    with pytest.raises(ConfigError) as caught:
        evaluate(module, folder, at=0, rows=6 if differs == "data" else ROWS)  # a batch would be Killed
    assert f"{differs} was " in str(caught.value)
    assert str(caught.value).count(" was ") == 1  # the others are the same
    assert "Give another evaluation.folder" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("other", [{"alpha": 8.0}, {"update": "hira"}], ids=str)
def test_the_same_values_by_another_method_are_refused(tiny_backbone, tmp_path, other):
    """LoRA's scale stands in no tensor, and HiRA's tensors have the names of LoRA's."""
    lora = {"gate": "none", "update": "lora"}
    evaluate(build(tiny_backbone, **lora), tmp_path, evaluate_by=["likelihood"], rows=2)
    with pytest.raises(ConfigError, match="method was"):
        evaluate(build(tiny_backbone, **(lora | other)), tmp_path, at=0, evaluate_by=["likelihood"], rows=2)


def test_predictions_of_nobody_knows_what_are_refused(whole, module, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "folder")
    (folder / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match=r"holds predictions, but no evaluation\.json"):
        evaluate(module, folder, at=0)
    assert content(folder) == content(whole[0])


def test_predictions_in_an_older_format_are_refused(whole, module, tmp_path):
    """Format 1 judged every generated text right or wrong."""
    folder = shutil.copytree(whole[0], tmp_path / "folder")
    identity = json.loads((folder / "evaluation.json").read_text())
    assert identity["format"] == FORMAT_VERSION >= 2
    (folder / "evaluation.json").write_text(json.dumps(identity | {"format": 1}))
    with pytest.raises(ConfigError, match=f"format was 1 and is {FORMAT_VERSION}"):
        evaluate(module, folder, at=0)
    assert content(folder) == content(whole[0])


BAD = [b"{", b"nonsense", b'[["likelihood"]]', b"7", b'["likelihood", 3]', b'{"example": "\xff"}']


@pytest.mark.parametrize("line", BAD, ids=str)
@pytest.mark.parametrize("name", ["part-0-0.jsonl", "part-1-3.jsonl", PREDICTIONS_FILE])
def test_a_damaged_line_is_named(tmp_path, name, line):
    good = b'{"example": 0, "task": "t"}' if name == PREDICTIONS_FILE else b'[["likelihood", 0, {}]]'
    (tmp_path / name).write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(ConfigError, match=f"{name}, line 2: damaged"):
        read_records(tmp_path)


def test_damage_stops_a_run(whole, module, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "folder")
    lines = content(folder).splitlines(keepends=True)
    (folder / PREDICTIONS_FILE).write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"predictions\.jsonl, line 3: damaged"):
        evaluate(module, folder, at=0)


# --- files ---


def test_what_is_kept_of_each_way_of_answering():
    """By hand; a text with a reference is not judged, and nothing is said of an answer in it."""
    assert generation_record(GeneratedAnswer("so it is b", "b", 1)) == {
        "text": "so it is b",
        "answer": "b",
        "choice": 1,
    }
    assert generation_record(GeneratedAnswer("so it is", None, None)) == {
        "text": "so it is",
        "answer": None,
        "choice": None,
    }
    assert generation_record(TextWithReference("i have a dog", "a cat")) == {
        "text": "i have a dog",
        "reference": "a cat",
    }
    question = RankedQuestion(7, 1, (-4.0, -2.0, -9.0), (8, 1, 9), (2, 1, 90))
    assert likelihood_record(question) == {
        "log_likelihoods": [-4.0, -2.0, -9.0],
        "tokens": [8, 1, 9],
        "characters": [2, 1, 90],
        "choice": {"sum": 1, "per_token": 0, "per_character": 2},
    }


def test_a_text_with_a_reference_is_read_again_with_scores_or_without(tmp_path):
    """The parts have none yet; the merged file has."""
    record = generation_record(TextWithReference("one\u2028two", "three\x85four"))
    part = PartFile(tmp_path, 0)
    part.write({("generation", 4): record})
    part.close()
    assert read_records(tmp_path) == {("generation", 4): record}
    scored = record | {"scores": {"token_f1": 0.1}}
    write_predictions(tmp_path, [{"task": "t", "example": 4, "key": "k", "gold": 0, "generation": scored}])
    assert read_records(tmp_path) == {("generation", 4): scored}


def test_part_files_never_share_a_name(tmp_path):
    """Also where one was removed, as the message about a damaged one proposes."""
    for _ in range(3):
        PartFile(tmp_path, 0).close()
    PartFile(tmp_path, 1).close()
    (tmp_path / "part-0-0.jsonl").unlink()
    PartFile(tmp_path, 0).close()
    assert len(list(tmp_path.glob("part-0-*"))) == 3
    assert len(list(tmp_path.glob("part-1-*"))) == 1


def test_a_batch_is_on_disk_when_it_is_written(tmp_path):
    part = PartFile(tmp_path, 0)
    record = {"text": "one\u2028two\x85😀", "answer": None, "choice": None}
    part.write({("generation", 4): record, ("generation", 2): record})
    assert read_records(tmp_path) == {("generation", 4): record, ("generation", 2): record}  # not closed
    part.close()


@pytest.mark.parametrize(
    "character",
    ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "é", "😀", "\x00"],
    ids=ascii,
)
def test_any_generated_text_can_be_read_again(tmp_path, character):
    """A model may write what Python takes for the end of a line."""
    record = {"text": f"one{character}two", "answer": "b", "choice": 1}
    row = {"task": "t", "example": 3, "key": "k", "gold": 0, "generation": record}
    write_predictions(tmp_path, [row, row | {"example": 4}])
    assert read_records(tmp_path) == {("generation", 3): record, ("generation", 4): record}
    assert (tmp_path / PREDICTIONS_FILE).read_bytes().count(b"\n") == 2


def test_discarding_leaves_what_is_not_ones_own(tmp_path):
    for name in ("part-0-0.jsonl", "part-1-2.jsonl", PREDICTIONS_FILE, "evaluation.json", "config.yaml", "parts.jsonl"):
        (tmp_path / name).write_text("")
    discard(tmp_path, merged=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        PREDICTIONS_FILE,
        "evaluation.json",
        "config.yaml",
        "parts.jsonl",
    }
    discard(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "parts.jsonl"}


# --- as a program ---


@pytest.mark.slow
def test_a_program_that_is_killed_goes_on_with_any_number_of_processes(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(build(tiny_backbone).model, tmp_path / "adapter")
    args = [
        "test",
        "--config",
        "quickstart.yaml",
        *tiny_args(tiny_backbone),
        "--model.warm_start",
        str(adapter),
    ]
    args += ["--data.init_args.test", '["everyday[:48]"]', "--data.init_args.eval_batch_size", "4"]
    args += ["--data.init_args.evaluate_by", "[likelihood, generation]", "--model.decoding.beams", "4"]
    assert main([*args, "--evaluation.folder", "whole"]) == 0
    command = [sys.executable, "-m", "gatera_lightning", *args, "--evaluation.folder", "killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    ) as program:
        patience = time.monotonic() + 120
        try:
            while program.poll() is None and time.monotonic() < patience:
                if any(path.stat().st_size > 8_000 for path in tmp_path.glob("killed/part-*")):
                    break
                time.sleep(0.002)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == -signal.SIGKILL
    assert 0 < len(read_records(tmp_path / "killed")) < 2 * 48
    shutil.copytree("killed", "killed_2")
    assert main([*args, "--evaluation.folder", "killed"]) == 0
    run_program(
        *args,
        "--evaluation.folder",
        "killed_2",
        *("--trainer.devices", "2", "--trainer.strategy", "ddp"),
        cwd=tmp_path,
    )
    for name in ("killed", "killed_2"):
        assert content(tmp_path / name) == content(tmp_path / "whole")
        assert (
            0
            < json.loads((tmp_path / name / "test_results.json").read_text())["resumed_predictions"]
            < 2 * 48
        )
