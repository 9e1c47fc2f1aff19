"""Reads values of config.json. An error names the field, its value and what is accepted."""

from collections.abc import Mapping
from typing import Any

from irqlora_jax.text import require

_LARGEST = 3e38
"""Larger numbers are infinite in float32."""


def check(ok: bool, field: str, value: Any, accepted: str) -> None:
    require(ok, f"config.json: {field}", value, accepted)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_size(field: str, value: Any) -> int:
    check(is_whole(value) and value >= 1, field, value, "a whole number of at least 1")
    return value


def read_token(field: str, value: Any) -> int | None:
    check(value is None or is_whole(value), field, value, "a whole number or null")
    return value


def read_flag(values: Mapping[str, Any], field: str) -> bool:
    value = values.get(field, False)
    check(isinstance(value, bool), field, value, "true or false")
    return value


def read_positive(field: str, value: Any) -> float:
    ok = is_whole(value) or isinstance(value, float)
    check(ok and 0 < value < _LARGEST, field, value, "a positive number")
    return float(value)


def not_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not null."""
    return {name: value for name, value in values.items() if value is not None}
