"""``preview``: examples as the model sees them, and statistics compared with the recipe's real batches."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from tiny_backbone import EOS, SAMPLES, PlainQuestion, run_program, sample_rows, tiny_args, tiny_data

from gatera_lightning.cli.main import main
from gatera_lightning.datamodules.batch import IGNORE_INDEX

CHAT = (
    "{% for turn in messages %}<{{ turn['role'] }}>\n{{ turn['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _no_weights(no_weights):
    """No test may load weights."""


@pytest.fixture
def show(tiny_backbone, capsys):
    """``show(*flags)``: what ``preview`` prints for the tiny recipe."""

    def printed(*flags, backbone=tiny_backbone):
        assert main(["preview", "--config", "quickstart.yaml", *tiny_args(backbone), *flags]) == 0
        return capsys.readouterr().out

    return printed


@pytest.fixture
def reject(recipe, problems):
    """``reject(*flags)``: the problems that ``preview`` reports."""
    return lambda *flags: problems("preview", *recipe, *flags)


@pytest.fixture
def chat_backbone(tiny_backbone, working_folder):
    """The tiny backbone with a chat template."""
    folder = working_folder / "chat"
    shutil.copytree(tiny_backbone, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    return folder


def settings(**data):
    """Flags of the data module."""
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in data.items()}
    return [part for name, value in text.items() for part in (f"--data.init_args.{name}", value)]


def values(printed, label):
    """What follows a label, for every line with it."""
    return re.findall(rf"^  {label} +(.*)$", printed, flags=re.MULTILINE)


def shown_examples(printed):
    """The heading of each example, and the text below it."""
    parts = re.split(r"^(example \d+, .*)\n", printed.partition("\ntrain: ")[0], flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], (text.rstrip("\n") for text in parts[1::2]), strict=True))


def real_data(folder, ranks=1, rank=0, accumulate=1, **changes):
    """The recipe's data module as ``fit`` uses it on one of ``ranks`` ranks."""
    recipe = {
        "validation": ["everyday[:16]"],
        "batch_size": 16,
        "eval_batch_size": 32,
        "group_by_length": True,
    }
    data = tiny_data(folder, **(recipe | changes))
    data.trainer = SimpleNamespace(
        world_size=ranks,
        global_rank=rank,
        is_global_zero=False,
        accumulate_grad_batches=accumulate,
        limit_train_batches=1.0,
    )
    data.setup("fit")
    data.setup("test")
    return data


def padding(batches):
    """The share of padding among the positions of real batches, as it is printed."""
    masks = [batch["attention_mask"] for batch in batches]
    padded, positions = sum(int((mask == 0).sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return f"{100 * padded / positions:.1f} %"


# --- examples ---


@pytest.mark.parametrize("count", [1, 3])
def test_preview_marks_supervised_tokens(show, count):
    shown = shown_examples(show("--rows", str(count)))
    assert len(shown) == count
    for number, (heading, text) in enumerate(shown):
        question = PlainQuestion.of(sample_rows("train")[number])
        indented = question.prompt.replace("\n", "\n  ")
        assert text == f"  {indented}⟦{question.answers[question.gold]}{EOS}⟧"
        assert re.fullmatch(rf"example {number}, everyday: \d+ tokens, \d+ supervised", heading)


def test_preview_shows_three_training_examples_by_default(show):
    printed = show()
    assert len(shown_examples(printed)) == 3
    assert printed == show("--rows", "3", "--split=train")


def test_preview_shows_all_examples_of_a_small_split(show):
    printed = show("--rows", "9", *settings(train=["everyday[:4]"], batch_size=2))
    assert len(shown_examples(printed)) == 4


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(
    ("template", "answer_format"), [("plain", "content"), ("alpaca", "label"), ("chat", "content")]
)
def test_marked_tokens_are_those_with_labels(
    show, tiny_backbone, chat_backbone, template, answer_format, train_on
):
    folder = chat_backbone if template == "chat" else tiny_backbone
    changes = {"template": template, "answer_format": answer_format, "train_on": train_on, "max_length": 400}
    shown = shown_examples(show("--rows", "4", *settings(**changes), backbone=folder))
    data = real_data(folder, **changes)
    batched = {}
    for batch in data.train_dataloader():
        for row, example in enumerate(batch["example_ids"].tolist()):
            length = int(batch["attention_mask"][row].sum())
            batched[example] = batch["input_ids"][row, :length], batch["labels"][row, :length]
    for number, (heading, text) in enumerate(shown):
        ids, labels = batched[number]
        supervised = labels != IGNORE_INDEX
        assert f"{len(ids)} tokens, {int(supervised.sum())} supervised" in heading
        full, marked = (
            data.tokenizer.decode(found).replace("\n", "\n  ") for found in (ids, ids[supervised])
        )
        assert text.count("⟦") == text.count("⟧") == 1
        assert text[text.index("⟦") + 1 : -1] == marked
        assert text.replace("⟦", "").removesuffix("⟧") == f"  {full}"


def test_preview_shows_special_tokens_of_the_chat_template(show, chat_backbone):
    (_, text), *_ = shown_examples(show(*settings(template="chat"), backbone=chat_backbone))
    question = PlainQuestion.of(sample_rows("train")[0])
    asked = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    answer = question.answers[question.gold].strip()
    assert text == f"  <user>\n  {asked}{EOS}\n  <assistant>\n  ⟦{answer}{EOS}⟧"


def test_preview_marks_every_response_of_a_chat(chat_backbone, capsys):
    data = settings(train=["calendar[:6]"], validation=1, test=["calendar"])
    flags = ["--config", "own_data.yaml", *tiny_args(chat_backbone), *data]
    assert main(["preview", *flags, "--rows", "9"]) == 0
    shown = [text for _, text in shown_examples(capsys.readouterr().out)]
    expected = []
    for line in (SAMPLES.parent / "calendar" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:6]:
        row = json.loads(line)
        turns = row.get("messages") or [
            {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"},
            {"role": "assistant", "content": row["output"]},
        ]
        marks = {"assistant": "⟦{}" + EOS + "⟧"}
        text = "".join(
            f"<{turn['role']}>\n{marks.get(turn['role'], '{}' + EOS).format(turn['content'])}\n"
            for turn in turns
        )
        expected.append(f"  {text.strip()}".replace("\n", "\n  "))
    assert max(text.count("⟦") for text in expected) == 3
    assert len(shown) == 5
    assert set(shown) < set(expected)  # one example is in the validation split


def test_shipped_recipe_for_own_data_needs_no_changes(chat_backbone, capsys):
    assert main(["preview", "--config", "own_data.yaml", "--model.backbone.id", str(chat_backbone)]) == 0
    printed = capsys.readouterr().out
    assert values(printed, "tasks") == ["calendar 120"]
    assert values(printed, "truncated") == ["0 prompts (0.0 %) to max_length 512"]
    assert "train/validation overlap: none of 24 validation examples" in printed
    assert "train/test overlap: none of 36 test examples" in printed


def test_terminal_gets_colors_instead_of_brackets(show, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    printed = show("--rows", "1")
    question = PlainQuestion.of(sample_rows("train")[0])
    assert f"\x1b[1;32m{question.answers[question.gold]}{EOS}\x1b[0m" in printed
    assert "⟦" not in printed


def test_text_that_looks_like_markup_is_printed_unchanged(show, working_folder):
    row = {
        "instruction": "Please choose the correct answer to the question: Is [bold]x[:48][/bold] [red]?\n\n"
        "Answer1: [/] Answer2: [b]y[/b]\n\nAnswer format: answer1/answer2",
        "answer": "answer2",
    }
    (working_folder / "[a].json").write_text(json.dumps([row] * 16))
    files = settings(train=["./[a].json"], test=["./[a].json"])
    printed = show("--rows", "1", *files)
    assert "example 0, [a]: " in printed
    assert values(printed, "tasks") == ["[a] 16"]
    assert f"  Question: Is [bold]x[:48][/bold] [red]?\n  Answer:⟦ [b]y[/b]{EOS}⟧\n" in printed
    assert f" tokens:  [/]{EOS}\n" in show("--rows", "1", "--split", "test", *files)


def test_truncated_prompts_are_named_and_counted(show, tiny_backbone):
    data = real_data(tiny_backbone)
    longest = [max(lengths) for lengths in data.tables["train"]["lengths"]]
    limit = sorted(longest)[30]
    printed = show("--rows", "48", *settings(max_length=limit))
    note = f", prompt truncated to max_length {limit}"
    truncated = [note in heading for heading, _ in shown_examples(printed)]
    assert truncated == [length > limit for length in longest]
    count = sum(truncated)
    assert 0 < count < 48
    assert values(printed, "truncated") == [
        f"{count} prompts ({100 * count / 48:.1f} %) to max_length {limit}"
    ]


def candidates(text):
    """The candidate lines below an example: verdict, number of tokens, text."""
    return re.findall(r"^  (correct|wrong), (\d+) tokens: (.*)$", text, flags=re.MULTILINE)


def test_test_example_shows_every_candidate(show, tiny_backbone):
    printed = show("--split", "test", "--rows", "6", *settings(train_on="all"))
    texts = re.split(r"^example \d+, ", printed.partition("\ntest: ")[0], flags=re.MULTILINE)[1:]
    table = real_data(tiny_backbone).tables["test"]
    assert len(texts) == 6
    for entry, row, text in zip(table, sample_rows("test"), texts, strict=False):
        question = PlainQuestion.of(row)
        found = candidates(text)
        assert [int(tokens) for _, tokens, _ in found] == [len(ids) for ids in entry["answers"]]
        for number, (verdict, _, answer) in enumerate(found):
            expected = f"{question.answers[number]}{EOS}"
            correct = number == question.gold
            assert (verdict, answer) == (("correct", f"⟦{expected}⟧") if correct else ("wrong", expected))
        # Only the answer is marked, although train_on is all.
        assert text.splitlines()[2] == f"  Answer:⟦{question.answers[question.gold]}{EOS}⟧"


@pytest.mark.parametrize("ranked", [True, False])
def test_validation_example_shows_candidates_if_they_are_ranked(show, ranked):
    printed = show("--split", "validation", "--rows", "2", *settings(rank_validation=ranked))
    verdicts = [verdict for verdict, _, _ in candidates(printed)]
    assert verdicts.count("correct") == (2 if ranked else 0)


# --- statistics ---


@pytest.mark.parametrize(
    ("grouped", "budget", "packing"),
    [
        (True, None, False),
        (False, None, False),
        (True, 150, False),
        (False, 150, False),
        (True, None, True),
        (False, None, True),
    ],
)
def test_training_statistics_match_real_batches(show, tiny_backbone, grouped, budget, packing):
    changes = {"group_by_length": grouped, "token_budget": budget, "packing": packing}
    printed = show("--trainer.accumulate_grad_batches", "2", *settings(**changes))

    def loader(**others):
        return real_data(tiny_backbone, accumulate=2, **(changes | others)).train_dataloader()

    shares = [
        padding(loader(**others))
        for others in ({}, {"group_by_length": not grouped}, {"packing": not packing})
    ]
    batches = list(loader(packing=False))
    lengths = sorted(int(n) for batch in batches for n in batch["attention_mask"].sum(1))
    supervised = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    assert "\ntrain: 48 examples\n" in printed
    assert values(printed, "tasks") == ["everyday 48"]
    # The 24th of 48 is the lower median; 46 is the smallest number of examples that is 95 % of 48.
    assert values(printed, "lengths") == [
        f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[23]}, 95 % at most {lengths[45]}"
    ]
    share = f"{100 * supervised / sum(lengths):.1f} %"
    assert values(printed, "supervised") == [f"{supervised} of {sum(lengths):,} non-padding tokens ({share})"]
    assert values(printed, "truncated") == ["0 prompts (0.0 %) to max_length 256"]
    assert len(set(shares)) == 3
    assert values(printed, "padding") == [
        f"{shares[0]} of the computed positions; "
        f"{shares[1]} with group_by_length: {str(not grouped).lower()}, "
        f"{shares[2]} with packing: {str(not packing).lower()}"
    ]
    (steps,) = values(printed, "steps")
    assert steps.startswith(f"{len(batches) // 2} optimizer steps per epoch, of batch_size 16")
    assert steps.endswith("over accumulate_grad_batches 2 × 1 ranks")
    assert ("token_budget 150" in steps) == (budget is not None)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (["--trainer.devices", "4"], 4),
        (["--trainer.devices", "2", "--trainer.num_nodes", "3"], 6),
        (["--trainer.devices", "[0, 2]"], 2),
        (["--trainer.devices", "0,2,3"], 3),
    ],
)
def test_batch_schedule_is_divided_among_all_ranks(show, tiny_backbone, flags, ranks):
    printed = show(*flags, "--trainer.accelerator", "gpu", *settings(batch_size=13))
    shares = []
    for others in ({}, {"group_by_length": False}, {"packing": True}):
        changes = {"ranks": ranks, "batch_size": 13} | others
        loaders = [real_data(tiny_backbone, rank=rank, **changes).train_dataloader() for rank in range(ranks)]
        shares.append(padding([batch for loader in loaders for batch in loader]))
    assert values(printed, "padding") == [
        f"{shares[0]} of the computed positions; {shares[1]} with group_by_length: false, "
        f"{shares[2]} with packing: true"
    ]
    (steps,) = values(printed, "steps")
    assert steps.startswith(f"{len(loaders[0])} optimizer steps per epoch")
    assert steps.endswith(f" × {ranks} ranks")


@pytest.mark.parametrize("devices", ["auto", "-1"])
def test_unknown_number_of_ranks_is_assumed(show, devices):
    (steps,) = values(show(f"--trainer.devices={devices}"), "steps")
    assert steps.endswith(f"× 1 ranks (assumed: trainer.devices is {devices})")


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("validation", [["everyday[:16]"], 11])
def test_validation_statistics_match_real_batches(show, tiny_backbone, validation, ranked):
    changes = {"validation": validation, "rank_validation": ranked, "eval_batch_size": 9}
    printed = show("--split", "validation", "--trainer.devices", "3", *settings(**changes))
    data = real_data(tiny_backbone, **changes)
    loader = data.val_dataloader()
    examples = 11 if validation == 11 else 16
    assert f"\nvalidation: {examples} examples\n" in printed
    assert values(printed, "padding") == [
        f"{padding(loader)} of the computed positions, in {len(loader)} batches of eval_batch_size 9"
    ]
    first = data.tables["validation"][0]["example"]
    assert printed.startswith(f"example {first}, everyday: ")
    assert f"train/validation overlap: none of {examples} validation examples" in printed
    assert values(printed, "steps") == []


def test_held_out_examples_are_not_part_of_training(show):
    assert "\ntrain: 37 examples\n" in show(*settings(validation=11))


def test_test_statistics_match_real_batches(show, tiny_backbone):
    changes = {"evaluate_by": ["likelihood", "generation"], "eval_batch_size": 5, "train_on": "all"}
    printed = show("--split", "test", *settings(**changes))
    data = real_data(tiny_backbone, **changes)
    likelihood, generation = data.test_dataloader()
    assert values(printed, "padding") == [
        f"{padding(likelihood)} of the computed positions, in {len(likelihood)} batches of eval_batch_size 5",
        f"{padding(generation)} of the prompt positions, for generation, in {len(generation)} batches of "
        "eval_batch_size 5",
    ]
    table = data.tables["test"]
    gold = [ids[index] for ids, index in zip(table["answers"], table["gold"], strict=True)]
    assert values(printed, "supervised")[0].startswith(f"{sum(map(len, gold))} of ")
    assert "overlap" not in printed  # the training split is not open


def test_overlap_is_counted_and_printed_once(show, working_folder, caplog):
    rows = sample_rows("train")[:20] + sample_rows("test")[2:4]
    (working_folder / "rows.json").write_text(json.dumps(rows))
    printed = show(*settings(train=["rows.json"]))
    (line,) = (line for line in printed.splitlines() if line.startswith("train/test overlap"))
    assert line.startswith(
        "train/test overlap: 2 of 6 test examples are also in train (everyday 2; indices 2, 3)"
    )
    assert "overlap" not in caplog.text


def test_tasks_are_counted_separately(show, working_folder):
    for name, count in (("zebra", 20), ("ant", 7)):
        (working_folder / f"{name}.json").write_text(json.dumps(sample_rows("train")[:count]))
    printed = show(*settings(train=["zebra.json", "ant.json", "everyday[:5]"]))
    assert "\ntrain: 32 examples\n" in printed
    assert values(printed, "tasks") == ["zebra 20, ant 7, everyday 5"]


def test_mixture_of_files_with_renamed_columns(tiny_backbone, working_folder, capsys, problems):
    lines = "".join(f"Why {n}?,So {n}.\n" for n in range(30))
    (working_folder / "mine.csv").write_text(f"question,answer\n{lines}")
    lines = [json.dumps({"question": f"How {n}?", "answer": f"Thus {n}."}) for n in range(10)]
    (working_folder / "theirs.jsonl").write_text("\n".join(lines))
    (working_folder / "own.yaml").write_text(
        "data: {class_path: gatera_lightning.datamodules.InstructionDataModule, "
        "init_args: {train: [mine.csv, theirs.jsonl], "
        "validation: [calendar], test: [calendar], columns: {instruction: question, output: answer}, "
        "weights: {mine: 1, theirs: 3}, template: plain, train_on: response}}\n"
    )
    flags = ["--config", "quickstart.yaml", "--config", "own.yaml", "--model.backbone.id", str(tiny_backbone)]
    assert main(["preview", *flags, *settings(validation=["mine.csv[:3]"], test=["theirs.jsonl"])]) == 0
    printed = capsys.readouterr().out
    assert values(printed, "tasks") == ["mine 10, theirs 30"]
    assert re.search(r"\n  Question: Why \d+\?\n  Answer:⟦ So \d+\.", printed)
    assert "train/test overlap: 10 of 10 test examples are also in train (theirs 10;" in printed
    reported = problems("preview", *flags, "--data.init_args.weights", "{mine: 1, others: 0}")
    assert [problem.partition(" ")[0] for problem in reported] == ["data.weights:"] * 2
    assert "'others'" in reported[0]
    assert "theirs" in reported[1]


# --- without weights, accelerator or output files ---


def test_preview_needs_no_weights(show, tiny_backbone, working_folder):
    folder = working_folder / "light"
    shutil.copytree(tiny_backbone, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert show(backbone=folder) == show()


def test_preview_of_a_recipe_for_four_gpus_runs_here(tiny_backbone, capsys, working_folder):
    data = settings(
        train=["everyday[:48]"], test=["everyday[:6]"], validation=8, data_dir="samples", max_length=400
    )
    flags = ["--config", "llama_commonsense.yaml", "--model.backbone.id", str(tiny_backbone), *data]
    assert main(["preview", *flags]) == 0
    printed = capsys.readouterr().out
    assert "### Response:\n  ⟦the correct answer is answer" in printed
    assert values(printed, "steps") == [
        "2 optimizer steps per epoch, of batch_size 32 over accumulate_grad_batches 1 × 4 ranks"
    ]
    assert main(["preview", *flags, "--config", "overlays/fsdp.yaml"]) == 0
    assert capsys.readouterr().out == printed
    assert list(working_folder.iterdir()) == []


def test_preview_ignores_settings_of_training(show):
    flags = ["--trainer.accelerator", "gpu", "--trainer.precision", "16-mixed", "--ckpt_path", "nowhere.ckpt"]
    flags += ["--model.optimizer.lr", "-1", "--model.warm_start", "nowhere"]
    flags += ["--model.adapter.target_modules", "[nothing]", "--throughput.every_n_steps", "-1"]
    flags += ["--trainer.use_distributed_sampler", "true", "--trainer.strategy", "fsdp"]
    assert show(*flags) == show()


def test_preview_writes_no_files(show, working_folder):
    show()
    show("--split", "test")
    assert list(working_folder.iterdir()) == []


# --- problems ---


def test_rows_and_split_are_reported_at_once(reject):
    assert reject("--rows", "0", "--split", "dev") == [
        "--rows: 0; accepted: an integer of at least 1",
        "--split: 'dev' is unknown; accepted: train, validation, test",
    ]


@pytest.mark.parametrize("rows", ["-1", "some", "1.5", ""])
def test_rows_has_to_be_a_positive_integer(reject, rows):
    assert reject("--rows", rows) == [f"--rows: {rows}; accepted: an integer of at least 1"]


def test_problems_of_data_and_tokenizer_are_those_of_fit(reject):
    reported = reject("--model.backbone.id", "/nowhere", *settings(train=["nothing"], batch_size=0))
    assert [problem.partition(": ")[0] for problem in reported] == [
        *("model.backbone.id", "data.batch_size", "data.train")
    ]
    assert "'/nowhere'" in reported[0]
    assert "'nothing' is unknown" in reported[2]


def test_only_sources_of_the_shown_split_have_to_exist(reject, show):
    flags = settings(test=["missing.json"])
    assert reject("--split", "test", *flags) == ["data.test: the file missing.json does not exist"]
    assert "train/test overlap: not checked, because the test examples cannot be read" in show(*flags)
    assert "\ntest: 6 examples\n" in show("--split", "test", *settings(train=["missing.json"]))
    assert reject("--split", "validation", *settings(validation=["missing.json"])) == [
        "data.validation: the file missing.json does not exist"
    ]


def test_malformed_example_is_named(reject, working_folder):
    rows = sample_rows("train")[:20]
    rows[16]["answer"] = "answer9"
    (working_folder / "rows.json").write_text(json.dumps(rows))
    (problem,) = reject(*settings(train=["rows.json"]))
    assert problem.startswith("rows.json, row 17: field 'answer': 'answer9' is not one of the options")


def test_problems_of_the_batch_schedule_are_reported_before_printing(reject):
    (problem,) = reject("--trainer.devices", "32")
    assert "data.batch_size: 16 examples per step cannot fill accumulate_grad_batches 1 × 32 ranks" in problem
    (problem,) = reject("--trainer.devices", "8", *settings(train=["everyday[:5]"]))
    assert "5 examples cannot fill 8 micro-batches" in problem


def test_missing_chat_template_is_reported(reject):
    (problem,) = reject(*settings(template="chat"))
    assert problem.startswith("data.template: chat needs a tokenizer with a chat template")


# --- the command line ---


def test_order_of_flags_does_not_matter(recipe, capsys):
    outputs = set()
    for args in (
        ["--rows", "2", "--split=train", *recipe, "--data.init_args.seed", "5", "--data.init_args.seed", "7"],
        ["--data.init_args.seed=7", "--rows=2", *recipe, "--split", "train"],
    ):
        assert main(["preview", *args]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1


def test_help_lists_own_flags(help_text):
    text = help_text("preview")
    assert all(word in text for word in ("--rows N", "--split", "train, validation, test"))


def test_unknown_flag_is_rejected(recipe, parser_error):
    error = parser_error("preview", *recipe, "--row", "2")
    assert error == "--row: there is no such setting; did you mean '--rows'?"


@pytest.mark.slow
def test_preview_runs_as_program(recipe, working_folder):
    assert "train: 48 examples" in run_program("preview", *recipe, cwd=working_folder)
