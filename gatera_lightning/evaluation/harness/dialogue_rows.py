"""The replies of dialogues for lm-eval, as ``test`` reads and judges them: ranked, and generated."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from gatera_lightning.datamodules.tasks.dialogue import DialogueDataModule
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.harness.rows import LocalModel, rows_to_answer, rows_to_rank
from gatera_lightning.evaluation.text_metrics import token_f1


def ranked_replies(**arguments: Any) -> dict[str, Dataset]:
    """Return the replies of a task's test split with their distractors, as lm-eval's ``custom_dataset``.

    Args:
        arguments: As for :func:`generated_replies`.

    Returns:
        ``test`` -> rows as :func:`~gatera_lightning.evaluation.harness.rows.rows_to_rank` returns them; the
        correct reply is the last of the choices.

    Raises:
        ConfigError: As in :func:`generated_replies`.
    """
    data, model = _read(**arguments)
    return {"test": rows_to_rank(data, model.tokenizer)}


def generated_replies(**arguments: Any) -> dict[str, Dataset]:
    """Return the replies of a task's test split to generate, as lm-eval's ``custom_dataset``.

    Args:
        arguments: ``task``, the name of a folder in ``data_dir``; ``adapter`` or ``backbone``, the model;
            ``template``, ``data_dir`` and ``max_length`` as the command has them; others are not read.

    Returns:
        ``test`` -> rows as :func:`~gatera_lightning.evaluation.harness.rows.rows_to_answer` returns them.

    Raises:
        ConfigError: The data cannot be read; the message names the file and the line.
    """
    data, model = _read(**arguments)
    return {"test": rows_to_answer(data, model.tokenizer)}


def judged_ranking(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Return whether the correct reply is the most likely one, and its share of the perplexity.

    Args:
        doc: A row of :func:`ranked_replies`.
        results: The log-likelihood of each reply, and whether greedy decoding would generate it.

    Returns:
        ``perplexity`` as (log-likelihood, tokens); with distractors also ``acc`` and ``acc_norm``, which are
        hits@1 by the summed likelihood and by that per character.
    """
    scores, gold = [score for score, _ in results], doc["gold"]
    judged: dict[str, Any] = {"perplexity": (scores[gold], len(doc["answer_ids"][gold]))}
    if len(scores) > 1:
        relative = [score / max(1, len(text)) for score, text in zip(scores, doc["choices"], strict=True)]
        judged["acc"] = float(scores.index(max(scores)) == gold)
        judged["acc_norm"] = float(relative.index(max(relative)) == gold)
    return judged


def judged_reply(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the F1 of the words of a generated reply and of the correct one.

    Args:
        doc: A row of :func:`generated_replies`.
        results: The generated text.
    """
    return {"f1": token_f1([results[0]], [doc["answer"]])[0]}


def _read(
    *,
    task: str,
    adapter: str | None = None,
    backbone: str | None = None,
    template: str | None = None,
    data_dir: str | None = None,
    max_length: int | None = None,
    **_: Any,
) -> tuple[DialogueDataModule, LocalModel]:
    model = LocalModel.of(adapter, backbone)
    data = DialogueDataModule(
        template=model.template(template),
        train_on="response",  # required, but nothing is trained
        data_dir=data_dir or "samples",
        test=[task],
        max_length=model.longest(max_length),
    )
    if data_dir is None and task not in DialogueDataModule.sample_tasks:
        raise ConfigError(f"--data_dir: is not set; accepted: a folder with {data.task_file(task, 'test')}")
    return data, model
