"""Checksums of a checkpoint: of its arrays, and of what we store beside them."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_SEAL = "checksum"


def checksums(tree: Any) -> dict[str, str]:
    """Computes the CRC-32 of the bytes of every array of a tree, by its path.

    Examples:
        >>> checksums({"adapters": {"a": np.arange(3, dtype=np.float32)}})
        {'adapters/a': '30c8bc70'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _crc(x) for path, x in leaves}


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum of the values themselves, which `check_seal` checks."""
    return {**values, _SEAL: _crc_of_json(values)}


def check_seal(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that were given to `seal`.

    Values without a checksum, of an earlier version, are returned as they are.

    Raises:
        ValueError: the values are not the sealed ones.
    """
    values = {name: value for name, value in stored.items() if name != _SEAL}
    if stored.get(_SEAL, _crc_of_json(values)) != _crc_of_json(values):
        raise ValueError("its values do not match their checksum")
    return values


def _crc(array: Any) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def _crc_of_json(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"
