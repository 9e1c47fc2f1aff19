"""The architecture of a LLaMA, as Hugging Face's config.json describes it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from irqlora_jax.text import require


def _require(ok: bool, field: str, value: Any, accepted: str) -> None:
    require(ok, f"config.json: {field}", value, accepted)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, for longer contexts than in the pretraining."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    """For llama3 only, like the next two fields."""
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def to_dict(self) -> dict[str, Any]:
        """The values as in config.json."""
        values = dataclasses.asdict(self)
        return (
            values if self.rope_type == "llama3" else {"rope_type": "linear", "factor": self.factor}
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture. Fields have the names of Hugging Face's config.json."""

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

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            _require(value >= 1, name, value, "a whole number of at least 1")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        accepted = f"a divisor of num_attention_heads = {heads}"
        _require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, accepted)
        ok = self.head_dim >= 2 and self.head_dim % 2 == 0
        _require(ok, "head_dim", self.head_dim, "a positive even number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a config.json. The rotary settings may be in their old or new place.

        Raises:
            ValueError: not a LLaMA, or an unsupported variant.
        """
        _require(
            values.get("model_type") == "llama", "model_type", values.get("model_type"), "'llama'"
        )
        for name, default in (
            ("attention_bias", False),
            ("mlp_bias", False),
            ("hidden_act", "silu"),
        ):
            value = values.get(name, default)
            _require(value == default, name, value, repr(default))
        needed = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        for name in needed:
            _require(isinstance(values.get(name), int), name, values.get(name), "a whole number")
        heads = values["num_attention_heads"]
        head_dim = values.get("head_dim")
        if head_dim is None:
            hidden = values["hidden_size"]
            accepted = f"a multiple of num_attention_heads = {heads}, or any if head_dim is given"
            _require(heads > 0 and hidden % heads == 0, "hidden_size", hidden, accepted)
            head_dim = hidden // heads
        theta, scaling = _read_rope(values)
        eos = values.get("eos_token_id", 2)
        kv_heads = values.get("num_key_value_heads")
        return cls(
            **{name: values[name] for name in needed},
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=values.get("max_position_embeddings", 2048),
            tie_word_embeddings=values.get("tie_word_embeddings", False),
            bos_token_id=values.get("bos_token_id", 1),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            pad_token_id=values.get("pad_token_id"),
        )

    def to_dict(self) -> dict[str, Any]:
        """An ordinary config.json, which `from_dict` and transformers read."""
        values = dataclasses.asdict(self)
        eos = values.pop("eos_token_ids")
        return values | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": self.rope_scaling and self.rope_scaling.to_dict(),
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        }

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


def _read_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    new = values.get("rope_parameters")
    field = "rope_scaling" if new is None else "rope_parameters"
    rope = dict(new or values.get("rope_scaling") or {})
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    accepted = "'default', 'linear' or 'llama3'"
    _require(
        rope_type in ("default", "linear", "llama3"), f"{field}.rope_type", rope_type, accepted
    )
    _require(rope.get("partial_rotary_factor", 1) == 1, f"{field}.partial_rotary_factor", rope, "1")
    if rope_type == "default":
        return float(theta), None
    names = ["factor"]
    if rope_type == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for name in names:
        ok = isinstance(rope.get(name), int | float) and rope[name] > 0
        _require(ok, f"{field}.{name}", rope.get(name), "a positive number")
    return float(theta), RopeScaling(rope_type, **{name: rope[name] for name in names})
