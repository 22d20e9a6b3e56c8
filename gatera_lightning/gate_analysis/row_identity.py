"""Know to which text each row of a forward pass belongs, while ``generate`` or a loop of one's own runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerationMode

_ONE_ROW_PER_TEXT = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class RowTracker:
    """Follows the rows of a batch: which texts have ended, and whether a row still holds the same text."""

    def __init__(self) -> None:
        self._finished: Tensor | None = None
        self._last_keys: Tensor | None = None
        self._generating = False
        self._last_ids: Tensor | None = None

    def begin_generation(self) -> None:
        """Start over: no text has ended, and none has been read."""
        self._finished, self._generating, self._last_ids = None, True, None

    def end_generation(self) -> None:
        """Start over, outside ``generate``."""
        self._finished, self._generating, self._last_ids = None, False, None

    def repeated_tokens(self, ids: Tensor | None) -> int:
        """Return how many leading tokens the last forward pass of the same generation read as well.

        Args:
            ids: The token ids (batch, tokens) of a forward pass without a cache.
        """
        if not self._generating:
            return 0
        before, self._last_ids = self._last_ids, ids
        if before is None or ids is None or before.shape[0] != ids.shape[0]:
            return 0
        length = before.shape[1]
        return length if torch.equal(before, ids[:, :length]) else 0

    def add_finished(self, finished: Tensor) -> None:
        """Note the rows (batch,) whose text has ended."""
        self._finished = finished if self._finished is None else self._finished | finished

    def unfinished(self, rows: int) -> Tensor:
        """Return a mask (rows,) of the rows whose text has not ended."""
        if self._finished is None or len(self._finished) != rows:
            return torch.ones(rows, dtype=torch.bool)
        return ~self._finished.cpu()

    def check_rows(self, cache: Any, tokens: int, *, continues: bool) -> None:
        """Compare what the cache holds of earlier tokens with what it held after the last forward pass.

        Args:
            cache: The cache after a forward pass.
            tokens: Tokens of this forward pass.
            continues: Whether it continued from the cache.

        Raises:
            ValueError: If a row of the cache now belongs to another text.
        """
        keys = _last_layer_keys(cache)  # (batch, heads, all tokens, width): they depend on the whole text
        before, self._last_keys = self._last_keys, None if keys is None else keys[:, :, -1].clone()
        if continues and before is not None and keys is not None and keys.shape[2] > tokens:
            found = keys[:, :, -1 - tokens]
            if before.shape != found.shape or not torch.equal(before, found):
                raise ValueError(
                    "capture_gates: the rows of the cache were reordered or replaced between two forward "
                    "passes, so a row of the batch is no longer one text. Capture decoding that keeps a "
                    "row for each text: greedy or sampling."
                )


def _last_layer_keys(cache: Any) -> Tensor | None:
    """Return the keys of the last layer if the cache holds exactly those of all its tokens, else None."""
    try:
        keys = cache.layers[-1].keys
        return keys if keys.shape[2] == int(cache.get_seq_length()) else None
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
        return None  # no cache, a recurrent one, or one that has not been filled


class _Recording(StoppingCriteriaList):
    """Stopping criteria that tell a tracker which rows they ended."""

    def __init__(self, criteria: StoppingCriteriaList, tracker: RowTracker) -> None:
        super().__init__(criteria)
        self._tracker = tracker

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        finished = super().__call__(input_ids, scores, **kwargs)
        self._tracker.add_finished(finished)
        return finished


@contextmanager
def tracked_generation(model: nn.Module, tracker: RowTracker) -> Iterator[None]:
    """Inside the block, ``model.generate`` tells ``tracker`` which rows have ended.

    Generation in which rows change their text raises ValueError before the first forward pass: beam search,
    assisted and prompt-lookup decoding, classifier-free guidance and a custom decoding loop.
    """
    generate, criteria_of = getattr(model, "generate", None), getattr(model, "_get_stopping_criteria", None)
    if generate is None or criteria_of is None:
        yield
        return
    own = {name: vars(model)[name] for name in ("generate", "_get_stopping_criteria") if name in vars(model)}

    def tracked_generate(*args: Any, **kwargs: Any) -> Any:
        for name in ("assistant_model", "custom_generate"):
            if kwargs.get(name) is not None:
                raise _rejected(name, type(kwargs[name]).__name__)
        tracker.begin_generation()
        try:
            return generate(*args, **kwargs)
        finally:
            tracker.end_generation()

    def tracked_criteria(generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        mode = generation_config.get_generation_mode()
        if mode not in _ONE_ROW_PER_TEXT:
            beams = (generation_config.num_beams or 1) > 1
            raise _rejected(*(("num_beams", generation_config.num_beams) if beams else ("mode", mode.value)))
        if generation_config.guidance_scale not in (None, 1):
            raise _rejected("guidance_scale", generation_config.guidance_scale)
        return _Recording(criteria_of(generation_config, *args, **kwargs), tracker)

    tracked = {"generate": tracked_generate, "_get_stopping_criteria": tracked_criteria}
    for name, method in tracked.items():
        setattr(model, name, method)
    try:
        yield
    finally:
        for name in tracked:
            delattr(model, name)  # uncovers the method of the class
        for name, method in own.items():
            setattr(model, name, method)


def _rejected(setting: str, value: object) -> ValueError:
    return ValueError(
        f"capture_gates: generate with {setting} {value!r} moves texts between rows, or reads tokens that no "
        "text keeps, so captured rows would mix texts; accepted: greedy search or sampling (num_beams 1). To "
        "see the gates of a beam's text, run the model on it inside capture_gates."
    )
