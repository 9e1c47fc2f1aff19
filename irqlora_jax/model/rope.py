"""Settings of the rotary positions, as config.json has them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from irqlora_jax.model.values import check, not_null, read_flag, read_positive, read_size

_ORIGINAL = "original_max_position_embeddings"
_MSCALES = ("mscale", "mscale_all_dim")
"""Of yarn; 0 counts as absent."""
_TYPES = ("linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, for longer contexts than in the pretraining.

    "linear": all frequencies are divided by `factor`. "dynamic": beyond max_position_embeddings,
    rope_theta grows with the length of the rows (NTK). "yarn": short waves stay, long ones are
    divided by `factor`, and queries and keys are scaled (arXiv 2309.00071). "llama3": short waves
    stay, long ones are divided by `factor`.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    """For llama3 only, like the next field."""
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """For llama3 and yarn."""
    attention_factor: float | None = None
    """Factor of rotated queries and keys, for yarn only, like the fields after it. Null: from
    `factor`, as in the paper."""
    beta_fast: float = 32.0
    """Waves with more turns than this within the original context stay."""
    beta_slow: float = 1.0
    """Waves with fewer turns than this are divided by `factor`."""
    truncate: bool = True
    """Round the limits between kept and divided waves to whole features."""

    def to_dict(self) -> dict[str, Any]:
        """The values as in config.json."""
        values = dataclasses.asdict(self)
        names = ["rope_type", "factor"]
        if self.rope_type == "llama3":
            names += ["low_freq_factor", "high_freq_factor", _ORIGINAL]
        if self.rope_type == "yarn":
            names += [_ORIGINAL, "beta_fast", "beta_slow", "truncate"]
            names += [] if self.attention_factor is None else ["attention_factor"]
        return {name: values[name] for name in names}

    @property
    def scale(self) -> float:
        """Factor of rotated queries and keys."""
        if self.rope_type != "yarn":
            return 1.0
        return _magnitude(self.factor) if self.attention_factor is None else self.attention_factor


def _magnitude(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads rope_theta and the scaling, which may be in their old or new place.

    Args:
        given: the values of config.json that are not null.

    Raises:
        ValueError: an invalid value; the message names the field.
    """
    field = "rope_parameters" if given.get("rope_parameters", {}) != {} else "rope_scaling"
    rope = given.get(field, {})
    check(isinstance(rope, dict), field, rope, "an object, or null")
    rope = not_null(rope)
    if "rope_theta" in rope:
        theta = read_positive(f"{field}.rope_theta", rope["rope_theta"])
    else:
        theta = read_positive("rope_theta", given.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    accepted = ", ".join(map(repr, ("default", *_TYPES)))
    check(rope_type in ("default", *_TYPES), f"{field}.rope_type", rope_type, accepted)
    part = rope.get("partial_rotary_factor", 1)
    check(part == 1, f"{field}.partial_rotary_factor", part, "1")
    if rope_type == "default":
        return theta, None
    factor = read_positive(f"{field}.factor", rope.get("factor"))
    if rope_type in ("linear", "dynamic"):
        return theta, RopeScaling(rope_type, factor)
    if rope_type == "yarn":
        return theta, _read_yarn(field, rope, factor, given)
    names = ("low_freq_factor", "high_freq_factor")
    low, high = (read_positive(f"{field}.{name}", rope.get(name)) for name in names)
    check(high > low, f"{field}.{names[1]}", high, f"more than {names[0]} = {low}")
    original = read_size(f"{field}.{_ORIGINAL}", rope.get(_ORIGINAL))
    return theta, RopeScaling("llama3", factor, low, high, original)


def _read_yarn(
    field: str, rope: Mapping[str, Any], factor: float, given: Mapping[str, Any]
) -> RopeScaling:
    def number(name: str, default: float | None) -> float | None:
        value = rope.get(name, default)
        return None if value is None else read_positive(f"{field}.{name}", value)

    original = rope.get(_ORIGINAL, given.get("max_position_embeddings", 2048))
    original = read_size(f"{field}.{_ORIGINAL}", original)
    fast, slow = number("beta_fast", 32.0), number("beta_slow", 1.0)
    assert fast is not None and slow is not None
    check(fast >= slow, f"{field}.beta_fast", fast, f"at least beta_slow = {slow}")
    scale = number("attention_factor", None)
    one, all_dim = (number(name, None) if rope.get(name) else None for name in _MSCALES)
    if scale is None and one is not None and all_dim is not None:
        scale = _magnitude(factor, one) / _magnitude(factor, all_dim)
    theta = read_positive("rope_theta", rope.get("rope_theta", given.get("rope_theta", 10000.0)))
    check(theta != 1, "rope_theta", theta, "another number than 1 with yarn")
    truncate = read_flag({"truncate": True, **rope}, "truncate")
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        attention_factor=scale,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
    )
