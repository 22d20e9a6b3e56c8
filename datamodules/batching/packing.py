"""Packing: put several sequences of a micro-batch into one row, so that less padding is computed.

Every sequence has its own positions and attends only to itself, and an optimizer step holds the same examples
as without packing. Losses and gradients are therefore the same up to rounding.
"""

import heapq
from collections.abc import Sequence


def pack_sequences(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Choose packed sequences that pad a micro-batch to as few tokens as possible.

    For every number of rows, sequences are put, longest first, into the emptiest row. Of the resulting
    batches that respect ``capacity``, the one with the smallest area (rows × longest row) is chosen, of equal
    ones that with the shortest rows. The area is never larger than without packing, and rarely more than a
    few percent above the optimum.

    Args:
        lengths: Tokens of each sequence.
        capacity: Maximum number of tokens of a packed row; raised to the longest sequence if necessary.

    Returns:
        Indices of the sequences in each row.
    """
    order = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])
    capacity = max(capacity, max(lengths))
    best, best_area = [[sequence] for sequence in order], len(lengths) * max(lengths)
    for count in range(len(lengths) - 1, 0, -1):
        if sum(lengths) > count * capacity:
            break
        packs: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, row) for row in range(count)]  # (tokens, row)
        for sequence in order:
            tokens, row = heapq.heappop(heap)
            packs[row].append(sequence)
            heapq.heappush(heap, (tokens + lengths[sequence], row))
        longest = max(tokens for tokens, _ in heap)
        if longest <= capacity and count * longest < best_area:
            best, best_area = packs, count * longest
    return best
