"""``preview``: rows as the model will see them, and figures that counting in the real batches confirms."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from tiny_backbone import EOS, SAMPLES, PlainQuestion, run_program, sample_rows, tiny_args, tiny_data

import gatera_lightning.training.model_loading
from gatera_lightning.cli.main import main

CHAT = (
    "{% for turn in messages %}<{{ turn['role'] }}>\n{{ turn['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, and loading weights is an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        gatera_lightning.training.model_loading, "load_backbone", lambda _: pytest.fail("weights were loaded")
    )
    return tmp_path


@pytest.fixture
def show(tiny_backbone, capsys):
    """``show(*flags)``: what ``preview`` prints for the tiny recipe."""

    def printed(*flags, backbone=tiny_backbone):
        assert main(["preview", "--config", "quickstart.yaml", *tiny_args(backbone), *flags]) == 0
        return capsys.readouterr().out

    return printed


@pytest.fixture
def refused(tiny_backbone, capsys):
    """``refused(*flags)``: the problems that ``preview`` reports, one a line."""

    def problems(*flags):
        assert main(["preview", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), *flags]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        return [line.removeprefix("  - ") for line in error.splitlines() if line.startswith("  - ")]

    return problems


def settings(**data):
    """Flags for the data module."""
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in data.items()}
    return [part for name, value in text.items() for part in (f"--data.init_args.{name}", value)]


def figure(printed, name):
    """What stands behind the name of a figure; every such line."""
    return re.findall(rf"^  {name} +(.*)$", printed, flags=re.MULTILINE)


def shown_rows(printed):
    """The heading of each row, and the text under it."""
    rows = re.split(r"^(example \d+, .*)\n", printed.partition("\ntrain: ")[0], flags=re.MULTILINE)[1:]
    return list(zip(rows[::2], (text.rstrip("\n") for text in rows[1::2]), strict=True))


def real_data(folder, ranks=1, rank=0, accumulate=1, **changes):
    """The recipe's data module as ``fit`` would use it in one of ``ranks`` processes."""
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


def counted(batches):
    """Share of padding among the positions of real batches, as it is printed."""
    masks = [batch["attention_mask"] for batch in batches]
    return (
        f"{100 * sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks):.1f} %"
    )


# --- rows ---


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_with_their_targets_marked(show, rows):
    shown = shown_rows(show("--rows", str(rows)))
    assert len(shown) == rows
    for number, (heading, text) in enumerate(shown):
        question = PlainQuestion.of(sample_rows("train")[number])
        indented = question.prompt.replace("\n", "\n  ")
        assert text == f"  {indented}⟦{question.answers[question.gold]}{EOS}⟧"
        assert re.fullmatch(rf"example {number}, everyday: \d+ tokens, \d+ targets", heading)


def test_three_rows_of_train_are_the_default(show):
    printed = show()
    assert len(shown_rows(printed)) == 3
    assert printed == show("--rows", "3", "--split=train")


def test_a_split_with_fewer_rows_shows_them_all(show):
    assert (
        len(
            shown_rows(
                show("--rows", "9", *settings(train=["everyday[:4]"]), "--data.init_args.batch_size", "2")
            )
        )
        == 4
    )


def chat_folder(tiny_backbone, path):
    """The tiny backbone with a chat template."""
    shutil.copytree(tiny_backbone, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    return path


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(
    ("template", "form"), [("plain", "content"), ("alpaca", "label"), ("chat", "content")]
)
def test_what_is_marked_is_what_the_labels_keep(show, tiny_backbone, elsewhere, template, form, train_on):
    folder = chat_folder(tiny_backbone, elsewhere / "chat") if template == "chat" else tiny_backbone
    changes = {"template": template, "answer_format": form, "train_on": train_on, "max_length": 400}
    shown = shown_rows(show("--rows", "4", *settings(**changes), backbone=folder))
    data = real_data(folder, **changes)
    seen = {}
    for batch in data.train_dataloader():
        for row, example in enumerate(batch["example_ids"].tolist()):
            length = int(batch["attention_mask"][row].sum())
            seen[example] = batch["input_ids"][row, :length], batch["labels"][row, :length]
    for number, (heading, text) in enumerate(shown):
        ids, labels = seen[number]
        kept = labels != -100
        assert f"{len(ids)} tokens, {int(kept.sum())} targets" in heading
        whole, marked = (data.tokenizer.decode(found).replace("\n", "\n  ") for found in (ids, ids[kept]))
        assert text.count("⟦") == text.count("⟧") == 1
        assert text[text.index("⟦") + 1 : -1] == marked
        assert text.replace("⟦", "").removesuffix("⟧") == f"  {whole}"


def test_the_chat_template_is_shown_with_its_special_tokens(show, tiny_backbone, elsewhere):
    flags = settings(template="chat")
    (_, text), *_ = shown_rows(show(*flags, backbone=chat_folder(tiny_backbone, elsewhere / "chat")))
    question = PlainQuestion.of(sample_rows("train")[0])
    asked = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    answer = question.answers[question.gold].strip()
    assert text == f"  <user>\n  {asked}{EOS}\n  <assistant>\n  ⟦{answer}{EOS}⟧"


def test_every_response_of_a_chat_is_marked(tiny_backbone, elsewhere, capsys):
    folder = chat_folder(tiny_backbone, elsewhere / "chat")
    flags = [
        "--config",
        "own_data.yaml",
        *tiny_args(folder),
        *settings(train=["calendar[:6]"], validation=1, test=["calendar"]),
    ]
    assert main(["preview", *flags, "--rows", "9"]) == 0
    shown = [text for _, text in shown_rows(capsys.readouterr().out)]
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
    assert set(shown) < set(expected)  # one is held out


def test_the_recipe_for_own_data_as_it_stands(tiny_backbone, elsewhere, capsys):
    folder = chat_folder(tiny_backbone, elsewhere / "chat")
    assert main(["preview", "--config", "own_data.yaml", "--model.backbone.id", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert figure(printed, "tasks") == ["calendar 120"]
    assert figure(printed, "shortened") == ["0 prompts (0.0 %) to max_length 512"]
    assert "train/validation overlap: none of 24 validation examples" in printed
    assert "train/test overlap: none of 36 test examples" in printed


def test_a_terminal_gets_colours_and_no_brackets(show, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    printed = show("--rows", "1")
    question = PlainQuestion.of(sample_rows("train")[0])
    assert f"\x1b[1;32m{question.answers[question.gold]}{EOS}\x1b[0m" in printed
    assert "⟦" not in printed


def test_what_looks_like_markup_is_printed_as_it_is(show, elsewhere):
    row = {
        "instruction": "Please choose the correct answer to the question: Is [bold]x[:48][/bold] [red]?\n\n"
        "Answer1: [/] Answer2: [b]y[/b]\n\nAnswer format: answer1/answer2",
        "answer": "answer2",
    }
    (elsewhere / "[a].json").write_text(json.dumps([row] * 16))
    files = settings(train=["./[a].json"], test=["./[a].json"])
    printed = show("--rows", "1", *files)
    assert "example 0, [a]: " in printed
    assert figure(printed, "tasks") == ["[a] 16"]
    assert f"  Question: Is [bold]x[:48][/bold] [red]?\n  Answer:⟦ [b]y[/b]{EOS}⟧\n" in printed
    assert f" tokens:  [/]{EOS}\n" in show("--rows", "1", "--split", "test", *files)


def test_a_shortened_prompt_is_said_of_its_row_and_counted(show, tiny_backbone):
    data = real_data(tiny_backbone)
    longest = [max(lengths) for lengths in data.tables["train"]["lengths"]]
    room = sorted(longest)[30]
    printed = show("--rows", "48", *settings(max_length=room))
    said = [f", prompt shortened to max_length {room}" in heading for heading, _ in shown_rows(printed)]
    assert said == [length > room for length in longest]
    assert 0 < sum(said) < 48
    assert figure(printed, "shortened") == [
        f"{sum(said)} prompts ({100 * sum(said) / 48:.1f} %) to max_length {room}"
    ]


def candidates(text):
    """The candidate lines under a row: right or wrong, tokens, text."""
    return re.findall(r"^  (right|wrong), (\d+) tokens: (.*)$", text, flags=re.MULTILINE)


def test_every_candidate_of_a_test_row_and_which_is_right(show, tiny_backbone):
    printed = show("--split", "test", "--rows", "6", *settings(train_on="all"))
    rows = re.split(r"^example \d+, ", printed.partition("\ntest: ")[0], flags=re.MULTILINE)[1:]
    table = real_data(tiny_backbone).tables["test"]
    assert len(rows) == 6
    for entry, row, text in zip(table, sample_rows("test"), rows, strict=False):
        question = PlainQuestion.of(row)
        found = candidates(text)
        assert [int(tokens) for _, tokens, _ in found] == [len(ids) for ids in entry["answers"]]
        for number, (verdict, _, answer) in enumerate(found):
            right = number == question.gold
            assert verdict == ("right" if right else "wrong")
            assert answer == (
                f"⟦{question.answers[number]}{EOS}⟧" if right else f"{question.answers[number]}{EOS}"
            )
        assert (
            text.splitlines()[2] == f"  Answer:⟦{question.answers[question.gold]}{EOS}⟧"
        )  # whatever train_on


@pytest.mark.parametrize("ranked", [True, False])
def test_candidates_of_a_validation_row_where_they_are_ranked(show, ranked):
    printed = show("--split", "validation", "--rows", "2", *settings(rank_validation=ranked))
    assert [verdict for verdict, _, _ in candidates(printed)].count("right") == (2 if ranked else 0)


# --- figures ---


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
def test_figures_of_train_are_those_of_its_batches(show, tiny_backbone, grouped, budget, packing):
    changes = {"group_by_length": grouped, "token_budget": budget, "packing": packing}
    printed = show("--trainer.accumulate_grad_batches", "2", *settings(**changes))

    def loader(**others):
        return real_data(tiny_backbone, accumulate=2, **(changes | others)).train_dataloader()

    shares = [
        counted(loader(**others))
        for others in ({}, {"group_by_length": not grouped}, {"packing": not packing})
    ]
    batches = list(loader(packing=False))
    lengths = sorted(int(n) for batch in batches for n in batch["attention_mask"].sum(1))
    targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert "\ntrain: 48 rows\n" in printed
    assert figure(printed, "tasks") == ["everyday 48"]
    # The 24th of 48 is the lower median; 46 of 48 rows are the least that are 95 % of them.
    assert figure(printed, "lengths") == [
        f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[23]}, 95 % at most {lengths[45]}"
    ]
    share = f"{100 * targets / sum(lengths):.1f} %"
    assert figure(printed, "targets") == [f"{targets} of {sum(lengths):,} real tokens ({share})"]
    assert figure(printed, "shortened") == ["0 prompts (0.0 %) to max_length 256"]
    assert len(set(shares)) == 3
    assert figure(printed, "padding") == [
        f"{shares[0]} of the computed positions; {shares[1]} with group_by_length: {str(not grouped).lower()}, "
        f"{shares[2]} with packing: {str(not packing).lower()}"
    ]
    (steps,) = figure(printed, "steps")
    assert steps.startswith(f"{len(batches) // 2} optimizer steps an epoch, of batch_size 16")
    assert steps.endswith("over accumulate_grad_batches 2 × 1 processes")
    assert ("token_budget 150" in steps) == (budget is not None)


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        (["--trainer.devices", "4"], 4),
        (["--trainer.devices", "2", "--trainer.num_nodes", "3"], 6),
        (["--trainer.devices", "[0, 2]"], 2),
        (["--trainer.devices", "0,2,3"], 3),
    ],
)
def test_every_process_has_its_part_of_the_plan(show, tiny_backbone, flags, processes):
    printed = show(*flags, "--trainer.accelerator", "gpu", *settings(batch_size=13))
    shares = []
    for others in ({}, {"group_by_length": False}, {"packing": True}):
        changes = {"ranks": processes, "batch_size": 13} | others
        loaders = [
            real_data(tiny_backbone, rank=rank, **changes).train_dataloader() for rank in range(processes)
        ]
        shares.append(counted([batch for loader in loaders for batch in loader]))
    assert figure(printed, "padding") == [
        f"{shares[0]} of the computed positions; {shares[1]} with group_by_length: false, {shares[2]} with packing: true"
    ]
    (steps,) = figure(printed, "steps")
    assert steps.startswith(f"{len(loaders[0])} optimizer steps an epoch")
    assert steps.endswith(f" × {processes} processes")


@pytest.mark.parametrize("devices", ["auto", "-1"])
def test_a_number_of_processes_that_only_the_machine_knows_is_assumed(show, devices):
    (steps,) = figure(show(f"--trainer.devices={devices}"), "steps")
    assert steps.endswith(f"× 1 processes (assumed: trainer.devices is {devices})")


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("validation", [["everyday[:16]"], 11])
def test_figures_of_validation(show, tiny_backbone, validation, ranked):
    changes = {"validation": validation, "rank_validation": ranked, "eval_batch_size": 9}
    printed = show("--split", "validation", "--trainer.devices", "3", *settings(**changes))
    data = real_data(tiny_backbone, **changes)
    loader = data.val_dataloader()
    rows = 11 if validation == 11 else 16
    assert f"\nvalidation: {rows} rows\n" in printed
    assert figure(printed, "padding") == [
        f"{counted(loader)} of the computed positions, in {len(loader)} batches of eval_batch_size 9"
    ]
    first = data.tables["validation"][0]["example"]
    assert printed.startswith(f"example {first}, everyday: ")
    assert f"none of the {rows} validation rows is a training row" in printed
    assert figure(printed, "steps") == []


def test_held_out_rows_are_not_trained_on(show):
    assert "\ntrain: 37 rows\n" in show(*settings(validation=11))


def test_figures_of_test_by_likelihood_and_by_generation(show, tiny_backbone):
    changes = {"evaluate_by": ["likelihood", "generation"], "eval_batch_size": 5, "train_on": "all"}
    printed = show("--split", "test", *settings(**changes))
    data = real_data(tiny_backbone, **changes)
    likelihood, generation = data.test_dataloader()
    assert figure(printed, "padding") == [
        f"{counted(likelihood)} of the computed positions, in {len(likelihood)} batches of eval_batch_size 5",
        f"{counted(generation)} of the prompts' positions, to generate from, in {len(generation)} batches of eval_batch_size 5",
    ]
    table = data.tables["test"]
    gold = [ids[right] for ids, right in zip(table["answers"], table["gold"], strict=True)]
    assert figure(printed, "targets")[0].startswith(f"{sum(map(len, gold))} of ")
    assert "overlap" not in printed  # the training rows are not opened


def test_preview_reports_overlap_once(show, elsewhere, caplog):
    (elsewhere / "rows.json").write_text(json.dumps(sample_rows("train")[:20] + sample_rows("test")[2:4]))
    printed = show(*settings(train=["rows.json"]))
    (line,) = [line for line in printed.splitlines() if "test rows" in line]
    assert line.startswith(
        "train/test overlap: 2 of 6 test examples are also in train (everyday 2; indices 2, 3)"
    )
    assert "overlap" not in caplog.text


def test_tasks_are_counted_apart(show, elsewhere):
    for name, count in (("zebra", 20), ("ant", 7)):
        (elsewhere / f"{name}.json").write_text(json.dumps(sample_rows("train")[:count]))
    printed = show(*settings(train=["zebra.json", "ant.json", "everyday[:5]"]))
    assert "\ntrain: 32 rows\n" in printed
    assert figure(printed, "tasks") == ["zebra 20, ant 7, everyday 5"]


def test_a_mixture_of_files_with_columns_of_their_own(tiny_backbone, elsewhere, capsys):
    (elsewhere / "mine.csv").write_text(
        "question,answer\n" + "".join(f"Why {n}?,So {n}.\n" for n in range(30))
    )
    lines = [json.dumps({"question": f"How {n}?", "answer": f"Thus {n}."}) for n in range(10)]
    (elsewhere / "theirs.jsonl").write_text("\n".join(lines))
    (elsewhere / "own.yaml").write_text(
        "data: {class_path: gatera_lightning.datamodules.InstructionDataModule, init_args: {train: [mine.csv, theirs.jsonl], "
        "validation: [calendar], test: [calendar], columns: {instruction: question, output: answer}, "
        "weights: {mine: 1, theirs: 3}, template: plain, train_on: response}}\n"
    )
    flags = ["--config", "quickstart.yaml", "--config", "own.yaml", "--model.backbone.id", str(tiny_backbone)]
    assert main(["preview", *flags, *settings(validation=["mine.csv[:3]"], test=["theirs.jsonl"])]) == 0
    printed = capsys.readouterr().out
    assert figure(printed, "tasks") == ["mine 10, theirs 30"]
    assert re.search(r"\n  Question: Why \d+\?\n  Answer:⟦ So \d+\.", printed)
    assert "train/test overlap: 10 of 10 test examples are also in train (theirs 10;" in printed
    assert main(["preview", *flags, "--data.init_args.weights", "{mine: 1, others: 0}"]) == 2
    said = capsys.readouterr().err
    assert "data.weights: 'others' is not a training source; accepted: mine, theirs" in said
    assert "data.weights: no weight for theirs; accepted: a number for each of mine, theirs" in said


# --- without weights, accelerator or traces ---


def test_a_folder_without_weights_will_do(show, tiny_backbone, elsewhere):
    shutil.copytree(tiny_backbone, elsewhere / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    assert show(backbone=elsewhere / "light") == show()


def test_a_recipe_for_four_gpus_on_this_machine(tiny_backbone, capsys, elsewhere):
    own = [
        *settings(
            train=["everyday[:48]"], test=["everyday[:6]"], validation=8, data_dir="samples", max_length=400
        )
    ]
    flags = ["--config", "llama_commonsense.yaml", "--model.backbone.id", str(tiny_backbone), *own]
    assert main(["preview", *flags]) == 0
    printed = capsys.readouterr().out
    assert "### Response:\n  ⟦the correct answer is answer" in printed
    assert figure(printed, "steps") == [
        "2 optimizer steps an epoch, of batch_size 32 over accumulate_grad_batches 1 × 4 processes"
    ]
    assert main(["preview", *flags, "--config", "overlays/fsdp.yaml"]) == 0
    assert capsys.readouterr().out == printed
    assert list(elsewhere.iterdir()) == []


def test_what_only_training_needs_is_not_in_the_way(show):
    flags = ["--trainer.accelerator", "gpu", "--trainer.precision", "16-mixed", "--ckpt_path", "nowhere.ckpt"]
    flags += [
        "--model.optimizer.lr",
        "-1",
        "--model.warm_start",
        "nowhere",
        "--model.adapter.target_modules",
        "[nothing]",
    ]
    flags += [
        "--throughput.every_n_steps",
        "-1",
        "--trainer.use_distributed_sampler",
        "true",
        "--trainer.strategy",
        "fsdp",
    ]
    assert show(*flags) == show()


def test_nothing_is_written(show, elsewhere):
    show()
    show("--split", "test")
    assert list(elsewhere.iterdir()) == []


# --- problems ---


def test_rows_and_split_are_checked_together(refused):
    assert refused("--rows", "0", "--split", "dev") == [
        "--rows: 0; accepted: an integer of at least 1",
        "--split: 'dev' is unknown; accepted: train, validation, test",
    ]


@pytest.mark.parametrize("rows", ["-1", "some", "1.5", ""])
def test_a_number_of_rows_that_is_none(refused, rows):
    assert refused("--rows", rows) == [f"--rows: {rows}; accepted: an integer of at least 1"]


def test_problems_of_data_and_tokenizer_are_reported_as_for_fit(refused):
    said = refused("--model.backbone.id", "/nowhere", *settings(train=["nothing"], batch_size=0))
    assert len(said) == 3
    assert said[0].startswith("model.backbone.id: '/nowhere' is not an existing folder")
    assert said[1].startswith("data.batch_size: 0; accepted:")
    assert said[2].startswith("data.train: task 'nothing' is unknown")


def test_sources_are_checked_for_the_split_that_is_shown(refused, show):
    flags = settings(test=["missing.json"])
    assert refused("--split", "test", *flags) == ["data.test: the file missing.json does not exist"]
    assert "train/test overlap: not checked, because the test examples cannot be read" in show(*flags)
    assert "\ntest: 6 rows\n" in show("--split", "test", *settings(train=["missing.json"]))
    assert refused("--split", "validation", *settings(validation=["missing.json"])) == [
        "data.validation: the file missing.json does not exist"
    ]


def test_a_malformed_row_is_named(refused, elsewhere):
    rows = sample_rows("train")[:20]
    rows[16]["answer"] = "answer9"
    (elsewhere / "rows.json").write_text(json.dumps(rows))
    (said,) = refused(*settings(train=["rows.json"]))
    assert said.startswith("rows.json, row 17: field 'answer': 'answer9' is not among the options")


def test_what_the_plan_refuses_is_refused_before_anything_is_printed(refused):
    (said,) = refused("--trainer.devices", "32")
    assert "data.batch_size: 16 examples per step cannot fill accumulate_grad_batches 1 × 32 ranks" in said
    (said,) = refused("--trainer.devices", "8", *settings(train=["everyday[:5]"]))
    assert "5 examples cannot fill 8 micro-batches" in said


def test_chat_without_a_template_is_refused(refused):
    (said,) = refused(*settings(template="chat"))
    assert said.startswith("data.template: chat needs a tokenizer with a chat template")


# --- the command line ---


def test_own_flags_may_stand_anywhere_and_others_keep_their_place(tiny_backbone, capsys):
    flags = ["--config", "quickstart.yaml", *tiny_args(tiny_backbone)]
    outputs = set()
    for args in (
        ["--rows", "2", "--split=train", *flags, "--data.init_args.seed", "5", "--data.init_args.seed", "7"],
        ["--data.init_args.seed=7", "--rows=2", *flags, "--split", "train"],
    ):
        assert main(["preview", *args]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1


def test_help_says_what_preview_takes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["preview", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(
        word in text
        for word in ("python -m gatera_lightning preview", "--rows N", "--split", "train, validation, test")
    )
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{verb}, which" in " ".join(text.split()) for verb in ("demo", "preview", "compare"))


def test_a_flag_that_fit_does_not_know_is_refused(tiny_backbone, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["preview", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), "--row", "2"])
    assert caught.value.code == 2
    assert "--row" in capsys.readouterr().err


def test_compare_is_a_verb(elsewhere, capsys):
    for name, choices in (("base", [0, 1, None]), ("better", [1, 1, 1])):
        (elsewhere / name).mkdir()
        rows = [
            {
                "task": "arc",
                "example": i,
                "key": f"k{i}",
                "gold": 1,
                "generation": {"text": "", "choice": choice},
            }
            for i, choice in enumerate(choices)
        ]
        (elsewhere / name / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["compare", "base", "better"]) == 0
    assert "## better minus base" in capsys.readouterr().out
    assert main(["compare", "base", "absent"]) == 2
    assert "absent: no such file or folder" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_program(tiny_backbone, elsewhere):
    printed = run_program("preview", "--config", "quickstart.yaml", *tiny_args(tiny_backbone), cwd=elsewhere)
    assert "train: 48 rows" in printed
