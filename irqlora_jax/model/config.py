"""The architecture of a LLaMA or a relative of it, as Hugging Face's config.json describes it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from irqlora_jax.model.families import ACCEPTED, FAMILIES, Family
from irqlora_jax.model.rope import RopeScaling as RopeScaling
from irqlora_jax.model.rope import read_rope
from irqlora_jax.model.values import (
    check,
    is_whole,
    not_null,
    read_flag,
    read_positive,
    read_size,
    read_token,
)

ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in `layer_types`."""
_LATER = (
    "model_type",
    "attention_bias",
    "sliding_window",
    "sliding_layers",
    "unrotated_layers",
)
"""Fields that `to_dict` writes in another form, or at the end as earlier versions did."""
_MOST_LAYERS = 10_000
"""More are a damaged file: lists of all layers would not fit into memory."""
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def _check_depth(layers: int) -> None:
    check(layers <= _MOST_LAYERS, "num_hidden_layers", layers, f"at most {_MOST_LAYERS}")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture. Fields have the names of Hugging Face's config.json.

    Not all `model_type` have all options: see `families.py`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    model_type: str = "llama"
    attention_bias: bool = False
    """Whether q_proj, k_proj, v_proj and o_proj have a bias."""
    sliding_window: int | None = None
    """Positions that a token attends to, its own included. Null: all before it."""
    sliding_layers: tuple[int, ...] = ()
    """The layers with the sliding window; all layers of a Mistral, or none. Files call them
    layer_types."""
    unrotated_layers: tuple[int, ...] = ()
    """The layers without rotary positions. Files have the others, no_rope_layers = 1."""

    def __post_init__(self) -> None:
        for name in (*_NEEDED, "num_key_value_heads", "max_position_embeddings"):
            read_size(name, getattr(self, name))
        _check_depth(self.num_hidden_layers)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        accepted = f"a divisor of num_attention_heads = {heads}"
        check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, accepted)
        ok = self.head_dim >= 2 and self.head_dim % 2 == 0
        check(ok, "head_dim", self.head_dim, "a positive even number")
        dynamic = self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic"
        ok = not dynamic or self.head_dim > 2
        check(ok, "head_dim", self.head_dim, "at least 4 with dynamic scaling")
        for name in ("rms_norm_eps", "rope_theta"):
            read_positive(name, getattr(self, name))
        check(self.model_type in FAMILIES, "model_type", self.model_type, ACCEPTED)
        accepted = f"False with model_type {self.model_type!r}"
        ok = "attention_bias" in self.family.options or not self.attention_bias
        check(ok, "attention_bias", self.attention_bias, accepted)
        self._check_layers()

    def _check_layers(self) -> None:
        options, every = self.family.options, tuple(range(self.num_hidden_layers))
        window, layers = self.sliding_window, self.sliding_layers
        if "sliding_window" not in options:
            check(window is None, "sliding_window", window, f"null for a {self.model_type}")
        if window is not None:
            read_size("sliding_window", window)
        accepted = "some of the layers, in order"
        if window is None or "sliding_layers" not in options:
            expected = () if window is None else every
            accepted = "no layers without sliding_window" if window is None else "all layers"
        else:
            expected = tuple(layer for layer in every if layer in layers) or every
        check(layers == expected, "sliding_layers", layers, accepted)
        found, can = self.unrotated_layers, "unrotated_layers" in options
        expected = tuple(layer for layer in every if layer in found) if can else ()
        accepted = "some of the layers, in order" if can else f"none for a {self.model_type}"
        check(found == expected, "unrotated_layers", found, accepted)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a config.json. The rotary settings may be in their old or new place.

        A field that is null has its default, as if it were absent. But null means that there is no
        such token, no sliding window, or as many heads of keys and values as of queries.

        Raises:
            ValueError: another kind of model, an unsupported variant, or an invalid value. The
                message names the field.
        """
        kind = values.get("model_type")
        check(isinstance(kind, str) and kind in FAMILIES, "model_type", kind, ACCEPTED)
        defaults = FAMILIES[str(kind)].defaults
        given, values = {**defaults, **not_null(values)}, {**defaults, **values}
        for name, default in (("mlp_bias", False), ("hidden_act", "silu")):
            value = given.get(name, default)
            check(value == default, name, value, repr(default))
        sizes = {name: read_size(name, given.get(name)) for name in _NEEDED}
        _check_depth(sizes["num_hidden_layers"])
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if "head_dim" not in given:
            accepted = f"a multiple of num_attention_heads = {heads}, or any if head_dim is given"
            check(hidden % heads == 0, "hidden_size", hidden, accepted)
        head_dim = given.get("head_dim", hidden // heads)
        check(is_whole(head_dim), "head_dim", head_dim, "a positive even number")
        theta, scaling = read_rope(given)
        eos = values.get("eos_token_id", 2)
        ends = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        accepted = "a whole number, a list of them, or null"
        check(all(map(is_whole, ends)), "eos_token_id", eos, accepted)
        return cls(
            **sizes,
            num_key_value_heads=read_size(
                "num_key_value_heads", not_null(values).get("num_key_value_heads", heads)
            ),
            head_dim=head_dim,
            rms_norm_eps=read_positive("rms_norm_eps", given.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=read_size(
                "max_position_embeddings", given.get("max_position_embeddings", 2048)
            ),
            tie_word_embeddings=read_flag(given, "tie_word_embeddings"),
            bos_token_id=read_token("bos_token_id", values.get("bos_token_id", 1)),
            eos_token_ids=ends,
            pad_token_id=read_token("pad_token_id", values.get("pad_token_id")),
            model_type=str(kind),
            attention_bias=read_flag(given, "attention_bias"),
            **_read_windows(given, values, sizes["num_hidden_layers"], str(kind)),
        )

    def to_dict(self) -> dict[str, Any]:
        """An ordinary config.json, which `from_dict` and transformers read."""
        values = dataclasses.asdict(self)
        for name in _LATER:
            del values[name]
        eos = values.pop("eos_token_ids")
        return values | {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "mlp_bias": False,
            "rope_scaling": self.rope_scaling and self.rope_scaling.to_dict(),
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            **self._windows_to_dict(),
        }

    def _windows_to_dict(self) -> dict[str, Any]:
        options, window, depth = self.family.options, self.sliding_window, self.num_hidden_layers
        if "sliding_window" not in options:
            return {}
        if "sliding_layers" not in options:
            return {"sliding_window": window}
        kinds = [SLIDING if layer in self.sliding_layers else FULL for layer in range(depth)]
        found: dict[str, Any] = {"use_sliding_window": window is not None}
        found |= {"sliding_window": window, "layer_types": kinds}
        if "unrotated_layers" in options:
            found["no_rope_layers"] = list(map(int, self.rotated))
        if self.model_type.startswith("qwen"):
            # Tools that do not know layer_types take the layers from here on for sliding ones.
            found["max_window_layers"] = min(self.sliding_layers, default=depth)
        return found

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer; None: a token attends to all before it."""
        layers = range(self.num_hidden_layers)
        return tuple(self.sliding_window if i in self.sliding_layers else None for i in layers)

    @property
    def rotated(self) -> tuple[bool, ...]:
        """Whether each layer has rotary positions."""
        return tuple(i not in self.unrotated_layers for i in range(self.num_hidden_layers))

    def of_layer(self, layer: int) -> "LlamaConfig":
        """The architecture of one layer alone. Layers of the same kind have the same."""
        if len(set(zip(self.windows, self.rotated, strict=True))) == 1:
            return self
        window = self.windows[layer]
        return dataclasses.replace(
            self,
            num_hidden_layers=1,
            sliding_window=window,
            sliding_layers=() if window is None else (0,),
            unrotated_layers=() if self.rotated[layer] else (0,),
        )

    @property
    def family(self) -> Family:
        """What all models of this `model_type` have in common."""
        return FAMILIES[self.model_type]

    @property
    def biased(self) -> tuple[str, ...]:
        """The linear layers with a bias."""
        return ATTENTION_NAMES if self.attention_bias else self.family.biased

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers, by name."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (wide, hidden),
            "up_proj": (wide, hidden),
            "down_proj": (hidden, wide),
        }


def _read_windows(
    given: Mapping[str, Any], values: Mapping[str, Any], depth: int, kind: str
) -> dict[str, Any]:
    """Reads the fields about sliding windows, as the class in transformers does."""
    options = FAMILIES[kind].options
    if "sliding_window" not in options:
        return {}
    window = values.get("sliding_window")  # null is not the default
    if window is not None:
        read_size("sliding_window", window)
    if "sliding_layers" not in options:
        every = () if window is None else tuple(range(depth))
        return {"sliding_window": window, "sliding_layers": every}
    used, found = read_flag(given, "use_sliding_window"), {}
    sliding = [used and window is not None] * depth
    if "unrotated_layers" in options:
        rotated = _read_rotated(given, depth)
        found = {"unrotated_layers": tuple(i for i, one in enumerate(rotated) if not one)}
        sliding = [own and not one for own, one in zip(sliding, rotated, strict=True)]
    else:
        first = given.get("max_window_layers", 0)
        check(is_whole(first) and first >= 0, "max_window_layers", first, "a whole number")
        sliding = [own and i >= first for i, own in enumerate(sliding)]
    kinds = given.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if own else FULL for own in sliding]
    accepted = f"a list of {depth} times {FULL!r} or {SLIDING!r}"
    ok = isinstance(kinds, list | tuple) and len(kinds) == depth
    ok = ok and all(each in (FULL, SLIDING) for each in kinds)
    check(ok, "layer_types", kinds, accepted)
    layers = tuple(layer for layer, each in enumerate(kinds) if each == SLIDING)
    accepted = f"{FULL!r} alone, unless use_sliding_window is true and sliding_window is given"
    check(not layers or (used and window is not None), "layer_types", kinds, accepted)
    return {"sliding_window": window if layers else None, "sliding_layers": layers, **found}


def _read_rotated(given: Mapping[str, Any], depth: int) -> list[int]:
    """1 for each layer with rotary positions, else 0."""
    interval = read_size("no_rope_layer_interval", given.get("no_rope_layer_interval"))
    kinds = given.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(depth)])
    ok = isinstance(kinds, list | tuple) and len(kinds) >= depth
    ok = ok and all(is_whole(one) and one in (0, 1) for one in kinds)
    check(ok, "no_rope_layers", kinds, f"a list of {depth} times 1 (with rotations) or 0")
    return list(kinds)[:depth]
