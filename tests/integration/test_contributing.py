"""The task in CONTRIBUTING.md is complete: it trains, is evaluated both ways, and can be compared."""

import json
import re
import sys
from pathlib import Path

import pytest

from gatera_lightning.cli.main import main

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
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
    """Arguments of a run with the task, whose module is in the working directory."""
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "TaskDataModule" in block)
    (tmp_path / "capitals.py").write_text(code, encoding="utf-8")
    folder = tmp_path / "data" / "capitals"
    folder.mkdir(parents=True)
    settings = {
        "template": "plain",
        "train_on": "response",
        "data_dir": "data",
        "evaluate_by": "[likelihood, generation]",
        "batch_size": "4",
    }
    for split in ("train", "validation", "test"):
        (folder / f"{split}.json").write_text(json.dumps(ROWS))
        settings[split] = "[capitals]"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield [
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "2"),
        *("--trainer.enable_progress_bar", "false"),
        *("--model.backbone.id", str(tiny_backbone), "--model.backbone.dtype", "float32"),
        *("--model.adapter.rank", "4", "--model.decoding.max_new_tokens", "3"),
        *("--data", "capitals.CapitalsDataModule"),
        *(f"--data.init_args.{name}={value}" for name, value in settings.items()),
    ]
    sys.modules.pop("capitals", None)


@pytest.mark.slow
def test_task_trains_is_evaluated_and_compared(capitals, tmp_path, capsys):
    assert main(["fit", *capitals]) == 0
    for name in ("one", "other"):
        assert main(["test", *capitals, "--evaluation.folder", str(tmp_path / name)]) == 0
    lines = (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert [(row["task"], row["gold"], len(row["likelihood"]["tokens"])) for row in predictions] == [
        ("capitals", 0, 2 + number % 3) for number in range(5)
    ]
    assert all(row["generation"].keys() == {"text", "answer", "choice"} for row in predictions)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    assert "5 examples in common" in capsys.readouterr().out


def test_malformed_row_of_the_task_is_named(capitals, tmp_path, capsys):
    file = tmp_path / "data" / "capitals" / "train.json"
    file.write_text(json.dumps([*ROWS, {"country": "Chad", "cities": ["Moundou"], "capital": "N'Djamena"}]))
    assert main(["fit", *capitals]) == 2
    assert "train.json, row 6: field 'capital': \"N'Djamena\" is not among Moundou" in capsys.readouterr().err
