"""Checksums of stored arrays, and of what is stored beside them."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from irqlora_jax.processes import fetch

_SEAL = "checksum"


def checksum(array: Any) -> str:
    """Computes the CRC-32 of the bytes of an array, in hexadecimal.

    Examples:
        >>> checksum(np.arange(3, dtype=np.float32))
        '30c8bc70'
    """
    return bytes_checksum(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def bytes_checksum(data: bytes | memoryview) -> str:
    """Computes the CRC-32 of bytes, in hexadecimal.

    Examples:
        >>> bytes_checksum(b"red")
        'fa615f8f'
    """
    return f"{zlib.crc32(data):08x}"


def text_checksum(text: str) -> str:
    """Computes the CRC-32 of a text in UTF-8, in hexadecimal.

    Examples:
        >>> text_checksum("red")
        'fa615f8f'
    """
    return bytes_checksum(text.encode())


def checksums(tree: Any) -> dict[str, str]:
    """Computes the checksum of every array of a tree, by its path. All processes.

    Examples:
        >>> checksums({"adapters": {"a": np.arange(3, dtype=np.float32)}})
        {'adapters/a': '30c8bc70'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): checksum(fetch(x))
        for path, x in leaves
    }


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum of the values themselves, which `check_seal` checks."""
    return {**values, _SEAL: _checksum_of_json(values)}


def check_seal(stored: Mapping[str, Any], mark: str = _SEAL) -> dict[str, Any]:
    """Returns the values that were given to `seal`.

    Values without a checksum and without `mark`, a name that came with the checksums, are of an
    earlier version, and are returned as they are.

    Raises:
        ValueError: the values are not the sealed ones.
    """
    values = {name: value for name, value in stored.items() if name != _SEAL}
    sealed = _SEAL in stored or mark in stored
    if sealed and stored.get(_SEAL) != _checksum_of_json(values):
        raise ValueError("its values do not match their checksum")
    return values


def _checksum_of_json(values: Mapping[str, Any]) -> str:
    return text_checksum(json.dumps(values, sort_keys=True))
