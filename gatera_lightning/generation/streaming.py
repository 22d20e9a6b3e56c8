"""Stream generated text, in pieces of complete characters with the mean gate of their tokens."""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from gatera_lightning.gate_analysis.capture import GateCapture

_INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TextStream(BaseStreamer):
    """A streamer for :func:`~gatera_lightning.generation.generate` that shows a token once its gates are
    known.

    The gates of a token are computed when the model reads it, one step after it was chosen: the first forward
    pass reads the prompt and chooses token 0, and forward pass ``k + 1`` reads token ``k`` and chooses token
    ``k + 1``. The last token is chosen but never read, so it is never shown. It is the one that ends the
    answer, unless the answer is cut off: ask for one more token then.

    Attributes:
        text: The text shown so far.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[str, float | None], None],
        captured: GateCapture | None = None,
    ) -> None:
        """Create the stream of one generation.

        Args:
            tokenizer: Decodes the tokens.
            show: Called with each piece of text and its gate: the mean over modules and over the tokens of
                the piece, None without ``captured``.
            captured: Gates of the generation, recorded while it runs.
        """
        self.text = ""
        self.tokenizer = tokenizer
        self.show = show
        self.captured = captured
        self._prompt_is_read = False
        self._chosen: list[int] = []
        self._read: list[int] = []
        self._gates: list[float] = []  # of the tokens that are read but not shown yet

    def put(self, value: Tensor) -> None:
        """Receive the prompt's tokens, (1, tokens), and then each token that is chosen, (1,)."""
        if not self._prompt_is_read:
            self._prompt_is_read = True
            return
        self._chosen += value.flatten().tolist()
        if len(self._chosen) > 1:
            number = len(self._chosen) - 2
            gate = None
            if self.captured is not None:
                gate = float(self.captured.calls[number + 1].gates[:, 0, -1].mean())
            self.read(self._chosen[number], gate)

    def read(self, token: int, gate: float | None = None) -> None:
        """Add a token that the model has read, and show the text that it completes."""
        self._read.append(token)
        self._gates += [] if gate is None else [gate]
        text = self._decode()
        if not text.endswith(_INCOMPLETE_CHARACTER):  # the next token may complete the bytes of a character
            self._show_up_to(text)

    def end(self) -> None:
        """Show the rest, including bytes that never became a character."""
        self._show_up_to(self._decode())

    def _decode(self) -> str:
        # Decode all tokens together: some tokenizers drop the space before a first word, and a later token
        # may complete the bytes of an earlier one.
        return str(
            self.tokenizer.decode(self._read, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _show_up_to(self, text: str) -> None:
        piece = text[len(self.text) :]
        gate = sum(self._gates) / len(self._gates) if self._gates else None
        self.text = text  # before showing it, so that an interrupt does not show it twice
        self._gates.clear()
        if piece:
            self.show(piece, gate)
