"""Several examples in a row, each seeing itself alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from irqlora_jax.data.examples import Example


def pack(lengths: Int[np.ndarray, " examples"], room: int, seed: int) -> list[list[int]]:
    """Distributes examples over rows of `room` tokens, as few as a greedy search finds.

    Best fit, decreasing: the longest example first, each into the fullest row that still takes it.
    Examples of equal length come in a random order of the seed.

    Args:
        lengths: of the examples, in tokens.
        room: tokens of a row.
        seed: of the order.

    Returns:
        The examples of each row; every example stands in exactly one.

    Raises:
        ValueError: an example is longer than a row.
    """
    if lengths.max(initial=0) > room:
        raise ValueError(
            f"data.packing_length = {room}: the longest example has {lengths.max()} tokens; "
            "accepted is at least that (data.source_length and data.target_length bound it)"
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    # open_rows[left]: rows with so many tokens left; counts says where there are any.
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
    """Rows of several examples, one after the other, with the number of the example at each token.

    Returns:
        "tokens" int32, "targets" bool and "segment_ids" int32, all [row, length]. The segments of
        a row are 1, 2, ...; padding is 0. The first token of a segment is no target: the model
        predicts it from the token in front, which is another example's.
    """
    shape = (len(rows), length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, bool)
    segment_ids = np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            place = (number, slice(start, start + len(example.tokens)))
            tokens[place], segment_ids[place] = example.tokens, segment
            targets[place] = example.targets
            targets[number, start] = False
            start += len(example.tokens)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}
