"""``chat``: a conversation with a tuned model; ``generate``: its answers to single prompts, for a terminal or a pipe."""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence

from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.terminal_model import Speaker, add_arguments, unusable
from gatera_lightning.datamodules.prompts.conversations import Chat, Instruction
from gatera_lightning.datamodules.prompts.templates import Message
from gatera_lightning.errors import ConfigError

_HELP = "/reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def generate(argv: Sequence[str]) -> None:
    """Print what the model answers to each ``--prompt``, and nothing else on standard output.

    Raises ConfigError for what cannot work, before a weight is loaded.
    """
    own = _generate_parser().parse_args(argv)
    _read_any_bytes()
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in own.prompt]
    speaker = Speaker(
        own,
        [
            f"--prompt: {prompt!r:.60} {why}; accepted: a text"
            for prompt in prompts
            if (why := unusable(prompt))
        ],
    )
    asked = [
        speaker.prompt_ids(prompt if speaker.template == "none" else Instruction(prompt.strip(), "", ""))
        for prompt in prompts
    ]
    if too_long := [
        f"--prompt: {prompt!r:.60} has {len(ids):,} tokens; accepted by this model with --max_new_tokens {own.max_new_tokens}: "
        f"at most {speaker.room:,}"
        for prompt, ids in zip(prompts, asked, strict=True)
        if len(ids) > speaker.room
    ]:
        raise ConfigError(too_long)
    speaker.introduce()
    with _as_long_as_somebody_reads():
        for prompt, ids in zip(prompts, asked, strict=True):
            if len(prompts) > 1:
                speaker.remark(f"> {prompt}")
            if speaker.answer(ids).stopped:
                raise SystemExit(130)


def chat(argv: Sequence[str]) -> None:
    """Answer line by line what is typed, or piped, until it ends; earlier turns are part of each prompt.

    Raises ConfigError for what cannot work, before a weight is loaded.
    """
    speaker = Speaker(_chat_parser().parse_args(argv))
    _read_any_bytes()
    speaker.prompt_ids(
        _asked([{"role": "user", "content": "?"}])
    )  # said now where a template takes no turn at all
    speaker.introduce()
    speaker.remark(_HELP)
    with _as_long_as_somebody_reads():
        _converse(speaker)


def _converse(speaker: Speaker) -> None:
    history: list[Message] = []
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            history.clear()
            speaker.remark("forgotten")
        elif re.fullmatch(r"/\w*", line):
            speaker.remark(f"{line} is no command: {_HELP}")
        elif line and (why := unusable(line)):
            speaker.remark(f"that {why}")
        elif line:
            history.append({"role": "user", "content": line})
            try:
                ids = _fitting(speaker, history)
            except ConfigError as error:  # some templates take no second turn
                history.pop()
                speaker.remark(f"not asked: {error}; /reset forgets what was said before")
                continue
            if ids:
                history.append({"role": "assistant", "content": speaker.answer(ids).text.strip()})


def _asked(history: Sequence[Message]) -> Chat:
    """The conversation so far, with a response that is yet to come."""
    return Chat((*history, {"role": "assistant", "content": ""}))


def _fitting(speaker: Speaker, history: list[Message]) -> list[int] | None:
    """The conversation's prompt, its oldest turns forgotten until it fits; None, and nothing kept, if none does."""
    turns = len(history) // 2
    while True:
        ids = speaker.prompt_ids(_asked(history))
        if len(ids) <= speaker.room or len(history) == 1:
            break
        del history[:2]
    room = f"the {speaker.room:,} tokens that --max_new_tokens {speaker.settings.max_new_tokens} leaves of this model's context"
    if len(ids) > speaker.room:
        history.clear()
        speaker.remark(f"that has {len(ids):,} tokens, more than {room}; forgotten")
        return None
    if dropped := turns - len(history) // 2:
        speaker.remark(f"the oldest {dropped} of {turns} turns are forgotten, to fit into {room}")
    return ids


def _lines() -> Iterator[str]:
    """What is typed, a line a turn, with the terminal's editing; or the lines of a file or pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines and recalls earlier ones with it
    while True:
        try:
            yield _typed().strip()
        except KeyboardInterrupt:
            print(f"\n{_HELP}", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _typed() -> str:
    """A line, asked for where answers do not go when they go into a file or pipe."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


@contextlib.contextmanager
def _as_long_as_somebody_reads() -> Iterator[None]:
    """End without a word, by the status of a broken pipe, when ``head`` has seen enough."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(141) from None


def _read_any_bytes() -> None:
    """Bytes that are not UTF-8 are said to be so, not stumbled over."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} generate",
        description="Let a tuned model answer prompts. Nothing but the answers goes to standard output.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        required=True,
        help="- reads standard input; may be repeated",
    )
    add_arguments(parser, ("chat", "plain", "alpaca", "none"))
    return parser


def _chat_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} chat",
        description="Talk to a tuned model, line by line; standard input may be a pipe.",
        epilog=_HELP,
        allow_abbrev=False,
    )
    add_arguments(parser, ("chat", "plain"))  # those that have several turns
    return parser
