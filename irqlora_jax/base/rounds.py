"""Makes matrices without a text: one after the other, shared among the processes of a run."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from irqlora_jax.base.exchange import from_bytes, gather_bytes, to_bytes, tree_bytes
from irqlora_jax.base.layerwise import Task
from irqlora_jax.base.stacks import Made, Matrix, Stacks
from irqlora_jax.files.tensors import Header, read_ahead
from irqlora_jax.model.tree import weight_name
from irqlora_jax.processes import together


def make_each(
    found: Mapping[str, Header], matrices: Sequence[Matrix], task: Task, stacks: Stacks, bar: Any
) -> None:
    """Makes one matrix after the other, without a text.

    Of several processes, each makes every n-th matrix of a kind, and gives it to the others.
    """
    count, own = jax.process_count(), jax.process_index()
    if count > 1:  # matrices of a round have about the same size
        kinds = {(matrix.stack, matrix.path): None for matrix in matrices}
        order = {kind: place for place, kind in enumerate(kinds)}
        matrices = sorted(matrices, key=lambda matrix: order[matrix.stack, matrix.path])
    rounds = [matrices[i : i + count] for i in range(0, len(matrices), count)]
    mine = [matrix for each in rounds for matrix in each[own : own + 1]]
    names = [weight_name(matrix.path, matrix.layer) for matrix in mine]
    with contextlib.closing(read_ahead(found, names, task.dtype)) as weights:

        def make(matrix: Matrix) -> Made:
            """A function, so that its local arrays are freed before the next matrix is read."""
            array = jax.device_put(next(weights), may_alias=True)
            made = task.make(matrix, array, None, None)
            if made.weight is not None and task.watch is not None:
                about = matrix.layer, matrix.path[-1], array, made.weight, matrix.quant
                task.watch(*about, None)
            return jax.block_until_ready(made)

        for each in rounds:
            made = together(lambda each=each: [make(matrix) for matrix in each[own : own + 1]])
            shapes = [found[weight_name(matrix.path, matrix.layer)].shape for matrix in each]
            made = list(_all_made(each, shapes, made, task))
            for matrix, shape in zip(each, shapes, strict=True):
                one = made.pop(0)  # so that it is freed before the next matrix is made
                if one.weight is not None:
                    bar.update(math.prod(shape))
                stacks.put(matrix, one)
                del one


def _all_made(
    matrices: Sequence[Matrix],
    shapes: Sequence[tuple[int, ...]],
    own: Sequence[Made],
    task: Task,
) -> Sequence[Made]:
    """What the processes made, each of one matrix. All processes.

    Args:
        matrices: of a round; the last round may have fewer of them than there are processes.
        shapes: of the matrices.
        own: what this process made, if it made any.
        task: what was asked for.
    """
    if jax.process_count() == 1:
        return own
    likes = [task.shapes(*each) for each in zip(matrices, shapes, strict=True)]
    data = gather_bytes(to_bytes(own, max(map(tree_bytes, likes))))
    return [from_bytes(one, like) for one, like in zip(data, likes, strict=False)]
