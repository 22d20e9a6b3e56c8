"""Lines of ``predictions.jsonl`` and folders of finished evaluations, made by hand."""

import json

import numpy as np

SCORES = ("sum", "per_token", "per_character")


def example_line(
    task="arc", example=0, key=None, gold=1, choice=1, nll=2.0, tokens=2, generated="none", text="so it is"
):
    """An example with three candidates.

    ``choice`` is the choice of every score, or a tuple of one for each. ``generated`` is the choice of the
    generated text; "none" leaves the text out.
    """
    choices = (choice,) * 3 if isinstance(choice, int) else choice
    likelihood = {
        "log_likelihoods": [-nll if i == gold else -9.0 for i in range(3)],
        "tokens": [tokens if i == gold else 9 for i in range(3)],
        "characters": [8, 12, 9],
        "choice": dict(zip(SCORES, choices, strict=True)),
    }
    key = key or f"{task}-{example}"
    fields = {"task": task, "example": example, "key": key, "gold": gold, "likelihood": likelihood}
    return fields if generated == "none" else fields | {"generation": {"text": text, "choice": generated}}


def solution_line(example, nll, tokens=3, task="sums"):
    """An example with a single candidate, such as the solution of a math problem."""
    likelihood = {"log_likelihoods": [-nll], "tokens": [tokens], "characters": [9]}
    likelihood["choice"] = dict.fromkeys(SCORES, 0)
    return {"task": task, "example": example, "key": f"{task}-{example}", "gold": 0, "likelihood": likelihood}


def text_line(example, text="i have a dog", reference="i have two dogs", task="talk", key=None, **scores):
    """An example whose generated text has a reference, with the ``scores`` of the text."""
    generation = {"text": text, "reference": reference, "scores": scores or {"token_f1": 0.5}}
    key = key or f"{task}-{example}"
    return {"task": task, "example": example, "key": key, "gold": 0, "generation": generation}


def random_text_lines(seed, n=60, shift=0.0):
    """Lines of two tasks with random F1 and METEOR, and both as arrays in the order of a recorded run."""
    generator = np.random.default_rng(seed)
    f1, meteor = generator.random(n) / 2 + shift, generator.random(n)
    lines = []
    for i in range(n):
        scores = {"token_f1": float(f1[i]), "meteor": float(meteor[i])}
        lines.append(text_line(i, f"text {i} of {seed}", f"the text {i} of all", f"t{i % 2}", **scores))
    order = [*range(0, n, 2), *range(1, n, 2)]
    return lines, f1[order], meteor[order]


def without(name, fields):
    """``fields`` without one of them."""
    return {key: value for key, value in fields.items() if key != name}


def write_run(folder, lines, adapter=None, file="predictions.jsonl"):
    """Write lines (mappings or strings) and the summary's ``adapter``; return a path for ``compare``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / file).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    if adapter is not None:
        (folder / "test_results.json").write_text(json.dumps({"model": {"adapter": adapter}, "seed": 0}))
    return folder if file == "predictions.jsonl" else folder / file
