"""General text that no method is trained on: descriptions of everyday scenes, from HellaSwag."""

from typing import Any

from gatera_lightning.datamodules import Example, TaskDataModule
from gatera_lightning.datamodules.tasks.commonsense import parse_question


class ProseDataModule(TaskDataModule):
    """A scene with its true ending: the title is the prompt, and the sentences are the answer."""

    tasks = ("hellaswag",)

    def example(self, row: dict[str, Any], task: str) -> Example:
        """Return ``Roof shingle removal:`` with ``A man is sitting on a roof. …``.

        Raises:
            ValueError: If the row has no title.
        """
        parsed = parse_question(row)
        title, colon, text = parsed.question.partition(": ")
        if not colon:
            raise ValueError("field 'instruction': expected a title and a colon before the text")
        answer = f" {text} {parsed.options[parsed.gold]}"
        return Example(f"{title}:", [answer], 0, task, identity=parsed.question)
