"""Writes a choice for every matrix as few patterns of names, for `quant.rules`."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from irqlora_jax.model.tree import ATTENTION_NAMES, linear_path
from irqlora_jax.sharding import LINEAR_NAMES

_SCOPES = {f"{'.'.join(linear_path(name))}": (name,) for name in LINEAR_NAMES}
_SCOPES |= {"self_attn.*": ATTENTION_NAMES, "mlp.*": LINEAR_NAMES[4:], "*": LINEAR_NAMES}
_COLUMNS = {scope: [LINEAR_NAMES.index(name) for name in names] for scope, names in _SCOPES.items()}
"""Ends of the patterns, and the projections that they match."""
ANY = -1
"""The choice of a matrix that does not matter."""


def find_patterns(choices: Int[np.ndarray, "layers 7"], default: int) -> list[tuple[str, int]]:
    """Finds patterns that give every matrix its choice, if the first one that matches holds.

    Works from the last pattern to the first, like a painter: each pattern gives its choice to all
    matrices that it matches, those of later patterns included. The next pattern is the one that
    corrects most matrices, and of equal ones the narrowest. This is not always the shortest list.

    Args:
        choices: a number of 0 or more for every matrix, or `ANY`; projections as `LINEAR_NAMES`.
        default: the choice where no pattern matches.

    Examples:
        >>> choices = np.zeros((12, 7), int)
        >>> choices[:, 6], choices[3, 6], choices[10:, :4] = 1, 0, 2
        >>> find_patterns(choices, 0)
        [('layers.3.mlp.down_proj', 0), ('layers.1[01].self_attn.*', 2), ('*.down_proj', 1)]
    """
    painted = np.where(choices == ANY, ANY, default)
    found: list[tuple[str, int]] = []
    while (painted != choices).any():
        offers = _offers(choices, painted)
        _, pattern, layers, columns, choice = max(
            offers, key=lambda one: (one[0], -len(one[2]) * len(one[3]), -len(one[1]), one[1])
        )
        cells = np.ix_(layers, columns)
        painted[cells] = np.where(choices[cells] == ANY, ANY, choice)
        found.insert(0, (pattern, choice))
    return found


def _offers(
    choices: np.ndarray, painted: np.ndarray
) -> Iterator[tuple[int, str, list[int], list[int], int]]:
    """Patterns that correct more matrices than they spoil: the difference, pattern, layers,
    columns and choice."""
    depth = len(choices)
    for choice in np.unique(choices[choices != painted]).tolist():
        right, own = painted == choices, choices == choice
        gains = (~right & own).astype(int) - (right & ~own & (choices != ANY)).astype(int)
        for scope, columns in _COLUMNS.items():
            by_layer = gains[:, columns].sum(axis=1)
            if by_layer.sum() > 0:
                name = f"*.{scope.removeprefix('self_attn.').removeprefix('mlp.')}"
                pattern = name if len(columns) == 1 else f"*.{scope}"
                yield int(by_layer.sum()), pattern, list(range(depth)), columns, choice
            for (length, start), members in _places(depth).items():
                sums = {digit: by_layer[layers].sum() for digit, layers in members.items()}
                digits = [digit for digit, gain in sums.items() if gain > 0]
                if digits:
                    rest = "[0-9]" * (length - len(start) - 1)
                    pattern = f"layers.{start}{_digits(digits)}{rest}.{scope}"
                    layers = sorted(itertools.chain(*(members[digit] for digit in digits)))
                    yield int(sum(sums[d] for d in digits)), pattern, layers, columns, choice


@functools.cache
def _places(depth: int) -> dict[tuple[int, str], dict[str, list[int]]]:
    """Layers by the length and the first digits of their numbers, and then by the next digit."""
    found: dict[tuple[int, str], dict[str, list[int]]] = {}
    for layer in range(depth):
        text = str(layer)
        for place, digit in enumerate(text):
            members = found.setdefault((len(text), text[:place]), {})
            members.setdefault(digit, []).append(layer)
    return found


def _digits(digits: list[str]) -> str:
    """Digits as in a shell pattern, with ranges."""
    numbers, parts = sorted(map(int, digits)), []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        own = [number for _, number in run]
        short = len(own) < 3
        parts.append("".join(map(str, own)) if short else f"{own[0]}-{own[-1]}")
    text = "".join(parts)
    return text if len(digits) == 1 else f"[{text}]"
