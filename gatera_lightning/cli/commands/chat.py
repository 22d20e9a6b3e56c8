"""`chat`: a conversation with a model, line by line."""

import re
from collections.abc import Sequence

from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.cli.terminal_arguments import add_arguments, text_problem
from gatera_lightning.cli.terminal_io import accept_any_bytes, input_lines
from gatera_lightning.cli.terminal_model import TerminalModel
from gatera_lightning.datamodules.prompts.conversations import Chat
from gatera_lightning.datamodules.prompts.template_messages import Message
from gatera_lightning.errors import ConfigError

_HELP = "/reset clears the conversation, /quit or Ctrl-D exits, Ctrl-C stops an answer"


def chat(argv: Sequence[str]) -> None:
    """Answer each line of standard input; earlier turns are part of the prompt.

    Args:
        argv: The flags.

    Raises:
        ConfigError: Something cannot work; no weight is loaded yet.
    """
    session = ChatSession(TerminalModel(_parser().parse_args(argv)))
    accept_any_bytes()
    session.check_template()
    session.model.describe()
    session.model.note(_HELP)
    for line in input_lines(_HELP):
        if line == "/quit":
            break
        session.read(line)


class ChatSession:
    """A conversation so far, and the model that answers."""

    def __init__(self, model: TerminalModel) -> None:
        self.model = model
        self._messages: list[Message] = []

    def check_template(self) -> None:
        """Raise ConfigError, before weights are loaded, if the template does not support a single turn."""
        self._prompt_ids([{"role": "user", "content": "?"}])

    def read(self, line: str) -> None:
        """Answer a line, or carry out a command that starts with `/`."""
        if line == "/reset":
            self._messages.clear()
            self.model.note("conversation cleared")
        elif re.fullmatch(r"/\w*", line):
            self.model.note(f"{line} is not a command: {_HELP}")
        elif line and (problem := text_problem(line)):
            self.model.note(f"the line {problem}")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        try:
            ids = self._truncated_prompt()
        except ConfigError as error:  # some templates support one turn only
            self._messages.pop()
            self.model.note(f"not answered: {error}; /reset clears the conversation")
            return
        if ids is not None:
            self._messages.append({"role": "assistant", "content": self.model.answer(ids).text.strip()})

    def _truncated_prompt(self) -> list[int] | None:
        """The prompt's token ids, without the oldest turns if necessary; None if the last one is too long."""
        model, turns = self.model, len(self._messages) // 2
        ids = self._prompt_ids(self._messages)
        while len(ids) > model.prompt_limit and len(self._messages) > 1:
            del self._messages[:2]
            ids = self._prompt_ids(self._messages)
        room = (
            f"the {model.prompt_limit:,} tokens of this model's context "
            f"that --max_new_tokens {model.args.max_new_tokens} leaves for the prompt"
        )
        if len(ids) > model.prompt_limit:
            self._messages.clear()
            model.note(
                f"not answered: the message has {len(ids):,} tokens, more than {room}; conversation cleared"
            )
            return None
        if dropped := turns - len(self._messages) // 2:
            model.note(f"dropped the oldest {dropped} of {turns} turns to fit into {room}")
        return ids

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to the start of the next response."""
        return self.model.prompt_ids(Chat((*messages, {"role": "assistant", "content": ""})))


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "chat",
        description="Talk to a fine-tuned model, one line per turn; standard input may be a pipe.",
        epilog=_HELP,
    )
    add_arguments(parser, ("chat", "plain"))  # the templates that support several turns
    return parser
