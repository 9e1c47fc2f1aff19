"""Packs several examples into a row; they do not attend to each other."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from irqlora_jax.data.examples import Example


def pack(lengths: Int[np.ndarray, " examples"], room: int, seed: int) -> list[list[int]]:
    """Packs examples greedily into few rows of `room` tokens (best-fit decreasing).

    The longest example comes first. Each goes into the fullest row that has enough room for it.
    The seed decides the order of examples with equal length.

    Args:
        lengths: of the examples, in tokens.
        room: length of a row, in tokens.
        seed: seed of the random order.

    Returns:
        Indices of the examples in each row. Every example is in exactly one row.

    Raises:
        ValueError: an example is longer than a row.
    """
    if lengths.max(initial=0) > room:
        raise ValueError(
            f"data.packing_length = {room}: the longest example has {lengths.max()} tokens; "
            "expected at least that (data.source_length and data.target_length bound it)"
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    # open_rows[left]: rows with `left` free tokens; counts[left]: their number.
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]
    counts = np.zeros(room + 1, int)
    for index in order[np.argsort(-lengths[order], kind="stable")]:
        length = int(lengths[index])
        left = length + int(np.argmax(counts[length:] > 0))
        if counts[left]:
            row = open_rows[left].pop()
            counts[left] -= 1
        else:
            row, left = len(rows), room
            rows.append([])
        rows[row].append(int(index))
        open_rows[left - length].append(row)
        counts[left - length] += 1
    return rows


def pad_packed(rows: Sequence[Sequence[Example]], length: int) -> dict[str, np.ndarray]:
    """Makes a batch of packed rows: the examples of a row one after the other, then padding.

    Returns:
        "tokens" int32, "targets" bool and "segment_ids" int32, all [row, length]. The segments of
        a row are 1, 2, ...; padding is 0. The first token of a segment is not a target, because
        the token before it belongs to another example.
    """
    shape = (len(rows), length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, bool)
    segment_ids = np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        start = 0
        # Streamed examples may be empty.
        for segment, example in enumerate((each for each in row if len(each.tokens)), 1):
            place = (number, slice(start, start + len(example.tokens)))
            tokens[place], segment_ids[place] = example.tokens, segment
            targets[place] = example.targets
            targets[number, start] = False
            start += len(example.tokens)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}
