"""CONTRIBUTING's example of a task family is a whole one: it trains, is evaluated both ways, and can be compared."""

import json
import re
import sys
from pathlib import Path

import pytest

from gatera_lightning.cli.main import main

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
CITIES = ["Rome", "Oslo", "Lima", "Cairo", "Quito"]
COUNTRIES = ["Italy", "Norway", "Peru", "Egypt", "Ecuador"]
ROWS = [
    {
        "country": country,
        "capital": capital,
        "cities": [capital, *sorted(set(CITIES) - {capital})][: 2 + number % 3],
    }
    for number, (country, capital) in enumerate(zip(COUNTRIES, CITIES, strict=True))
]


@pytest.fixture
def capitals(tmp_path, monkeypatch, tiny_backbone):
    """Arguments of a run on the example's rows, its module lying in the working folder."""
    (block,) = (
        block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "TaskFamily" in block
    )
    (tmp_path / "capitals_family.py").write_text(block, encoding="utf-8")
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / "capitals").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "capitals" / f"{split}.json").write_text(json.dumps(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield [
        *(
            "--trainer.accelerator",
            "cpu",
            "--trainer.max_steps",
            "2",
            "--trainer.enable_progress_bar",
            "false",
        ),
        *("--model.backbone.id", str(tiny_backbone), "--model.backbone.dtype", "float32"),
        *("--model.adapter.rank", "4", "--model.decoding.max_new_tokens", "3"),
        *(
            "--data",
            "capitals_family.CapitalsDataModule",
            "--data.init_args.template",
            "plain",
            "--data.init_args.train_on",
        ),
        *(
            "response",
            "--data.init_args.data_dir",
            "data",
            "--data.init_args.evaluate_by",
            "[likelihood, generation]",
        ),
        *(
            arg
            for split in ("train", "validation", "test")
            for arg in (f"--data.init_args.{split}", "[capitals]")
        ),
        *("--data.init_args.batch_size", "4"),
    ]
    sys.modules.pop("capitals_family", None)


def test_the_example_trains_is_evaluated_and_compared(capitals, tmp_path, capsys):
    assert main(["fit", *capitals]) == 0
    for name in ("one", "other"):
        assert main(["test", *capitals, "--evaluation.folder", str(tmp_path / name)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["task"], row["gold"], len(row["likelihood"]["tokens"])) for row in rows] == [
        ("capitals", 0, 2 + number % 3) for number in range(5)
    ]
    assert all(row["generation"].keys() == {"text", "answer", "choice"} for row in rows)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    assert "5 rows are common" in capsys.readouterr().out


def test_a_broken_row_of_the_example_is_named(capitals, tmp_path, capsys):
    file = tmp_path / "data" / "capitals" / "train.json"
    file.write_text(json.dumps([*ROWS, {"country": "Chad", "cities": ["Moundou"], "capital": "N'Djamena"}]))
    assert main(["fit", *capitals]) == 2
    assert "train.json, row 6: field 'capital': \"N'Djamena\" is not among Moundou" in capsys.readouterr().err
