"""Ranks and alphas that differ between the layers of a PEFT adapter (`rank_pattern`).

PEFT sorts the names in a pattern when it saves. So if several match a layer, the file and not the
original order decides, as in PEFT's own reading.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.model.tree import LAYERS, Keys
from irqlora_jax.text import shorten

Place = tuple[Keys, int]
"""Path of a linear layer in a decoder layer, and the number of the decoder layer."""
RANKS, ALPHAS = "rank_pattern", "alpha_pattern"
_POWERS = {"rank": 1.0, "sqrt_rank": 0.5}
_DEFAULT = 8
"""PEFT's own rank and alpha."""


class OwnRank(NamedTuple):
    """The pair of one layer in a file.

    Attributes:
        rank: its rank.
        factor: what lora_B is multiplied with, so that the update has `adapter.scale`.
    """

    rank: int
    factor: float

    def padded(self, leaf: str, value: np.ndarray, rank: int) -> np.ndarray:
        """lora_A or lora_B of this rank with zeros up to `rank`. The update has `adapter.scale`."""
        spare = (0, rank - self.rank)
        if leaf == "lora_A":
            return np.pad(value, (spare, (0, 0)))
        return np.pad(value * np.float32(self.factor), ((0, 0), spare))


def has_patterns(values: Mapping[str, Any]) -> bool:
    """Whether the fields of a file give some layers their own rank or alpha."""
    return any(values.get(name) not in ({}, None) for name in (RANKS, ALPHAS))


def read_ranks(
    file: Path, values: Mapping[str, Any], adapter: AdapterConfig, places: Sequence[Place]
) -> dict[Place, OwnRank]:
    """The rank of each layer in a file with patterns.

    Args:
        file: adapter_config.json, for messages.
        values: its fields.
        adapter: has the largest of the ranks, and the alpha of a layer with this rank.
        places: the adapted layers.

    Raises:
        ValueError: no patterns of ranks and alphas, or the adapter has another rank or alpha.
    """
    ranks = [int(rank) for rank in _by_place(file, values, "r", RANKS, places)]
    alphas = _by_place(file, values, "lora_alpha", ALPHAS, places)
    largest = max(ranks)
    if adapter.rank != largest:
        raise ValueError(
            f"{file}: the largest rank of a layer (r, {RANKS}) is {largest}, but adapter.rank = "
            f"{adapter.rank}"
        )
    known = sorted({alpha for rank, alpha in zip(ranks, alphas, strict=True) if rank == largest})
    if adapter.alpha not in known:
        raise ValueError(
            f"{file}: lora_alpha of the layers of rank {largest} is "
            f"{' or '.join(f'{alpha:g}' for alpha in known)}, but adapter.alpha = {adapter.alpha:g}"
        )
    power = _POWERS[adapter.scaling]
    return {
        place: OwnRank(rank, alpha / rank**power / adapter.scale)
        for place, rank, alpha in zip(places, ranks, alphas, strict=True)
    }


def _by_place(
    file: Path, values: Mapping[str, Any], name: str, pattern: str, places: Sequence[Place]
) -> list[float]:
    """A number for each place: of the first name in the pattern that matches, as in PEFT, else of
    the field `name`. A name may be a regular expression."""
    accepted = "a positive number" if pattern == ALPHAS else "a whole number of at least 1"

    def checked(field: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        ok = number and 0 < value < math.inf and (pattern == ALPHAS or value % 1 == 0)
        if not ok:
            raise ValueError(f"{file}: {field} = {shorten(value)}: expected {accepted}")
        return float(value)

    default = checked(name, values.get(name, _DEFAULT))
    given = values.get(pattern) or {}
    try:
        parts = [(re.compile(rf"(.*\.)?({key})$"), key, value) for key, value in given.items()]
    except (AttributeError, re.error) as error:
        kind = "numbers by layer, whose names may be regular expressions"
        raise ValueError(f"{file}: {pattern} = {shorten(given)}: expected {kind}") from error
    own = [(known, checked(f"{pattern}.{key}", value)) for known, key, value in parts]

    def find(path: Keys, layer: int) -> float:
        place = ".".join(("model", LAYERS, str(layer), *path))
        return next((value for known, value in own if known.match(place)), default)

    return [find(*place) for place in places]


def rank_fields(adapter: AdapterConfig, ranks: Mapping[Place, int]) -> dict[str, Any]:
    """Fields for pairs of these ranks by place, whose update has the factor of `adapter`.

    A name in a pattern is a projection, or one in a layer if its rank differs between layers.
    """
    own: dict[Keys, set[int]] = {}
    for (path, _), rank in ranks.items():
        own.setdefault(path, set()).add(rank)
    names = {
        path[-1] if len(own[path]) == 1 else ".".join((LAYERS, str(layer), *path)): rank
        for (path, layer), rank in ranks.items()
    }
    power = _POWERS[adapter.scaling]
    alphas = {rank: adapter.alpha * (rank / adapter.rank) ** power for rank in ranks.values()}
    largest = max(alphas)
    fields: dict[str, Any] = {"r": largest, "lora_alpha": alphas[largest]}
    others = {name: rank for name, rank in names.items() if rank != largest}
    if others:
        fields[RANKS] = others
        fields[ALPHAS] = {name: alphas[rank] for name, rank in others.items()}
    return fields
