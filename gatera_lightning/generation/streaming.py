"""Text while it is generated: pieces of whole characters, each with the mean gate of its tokens."""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from gatera_lightning.gate_analysis.capture import GateCapture


class TextStream(BaseStreamer):
    """A streamer for ``generate`` that hands out a token when the model has read it, one step after it was chosen.

    A token's gates are computed where it is read: the prompt is read in forward 0, which chooses token 0; token ``k`` is read
    in forward ``k + 1``, which chooses token ``k + 1``. The token that is chosen last is therefore never handed out: it is
    the one that ends the answer, or one too many, which has to be asked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[str, float | None], None],
        captured: GateCapture | None = None,
    ) -> None:
        """``show(piece, gate)`` is called as the text goes on; ``captured`` fills up while it is generated.

        The gate of a piece is the mean over modules and over the tokens that form its characters; None without ``captured``.
        """
        self.text = ""
        self.tokenizer = tokenizer
        self.show = show
        self.captured = captured
        self._prompt_is_read = False
        self._chosen: list[int] = []
        self._read: list[int] = []
        self._gates: list[float] = []  # of the tokens behind ``text``

    def put(self, value: Tensor) -> None:
        """The prompt's tokens (1, tokens) first, then each that is chosen, (1,)."""
        if not self._prompt_is_read:
            self._prompt_is_read = True
            return
        self._chosen += value.flatten().tolist()
        if len(self._chosen) > 1:
            number = len(self._chosen) - 2
            gate = (
                None
                if self.captured is None
                else float(self.captured.calls[number + 1].gates[:, 0, -1].mean())
            )
            self.read(self._chosen[number], gate)

    def read(self, token: int, gate: float | None = None) -> None:
        """Go on by a token that was read."""
        self._read.append(token)
        self._gates += [] if gate is None else [gate]
        text = self._decoded()
        if not text.endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):  # the first bytes of a character that the next token goes on with
            self._hand_out(text)

    def end(self) -> None:
        """Hand out what was held back: bytes that never became a character."""
        self._hand_out(self._decoded())

    def _decoded(self) -> str:
        # As a whole: some tokenizers drop the space before a first word, and a later token may complete an earlier one's bytes.
        return str(
            self.tokenizer.decode(self._read, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _hand_out(self, text: str) -> None:
        piece, gate = text[len(self.text) :], sum(self._gates) / len(self._gates) if self._gates else None
        self.text = text  # before it is shown: an interrupt must not show it twice
        self._gates.clear()
        if piece:
            self.show(piece, gate)
