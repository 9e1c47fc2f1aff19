"""Models that calibrations are measured on, each in several draws: the same function, other blocks.

stories260K has weights of a real training (its files are arguments), factworld (examples/factworld)
counts what is remembered. Nothing is finetuned here. Weights are quantized as the library stores
them and computed with as the float32 numbers that this stands for, so that one compiled program
serves all formats.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from irqlora_jax import hf
from irqlora_jax.data.examples import encode_source
from irqlora_jax.evaluate import evaluation_loss, load_questions, score_questions
from irqlora_jax.evaluate.perplexity import text_windows
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor

sys.path.append(str(Path(__file__).parent.parent / "examples" / "factworld"))
import world as factworld
from draws import quantized
from permute import permute

Base = dict[str, Any]
JITTER = 0.1  # channels of a draw are rescaled by factors within 1 +- this


@dataclasses.dataclass(frozen=True, eq=False)
class Testbed:
    """Attributes:
    figures: what `measure` returns, each with the sign of better.
    bases: one for each draw, in turns.
    measure: figures of a float base.
    documents: rows of tokens like those of the training, for what wants inputs.
    """

    name: str
    figures: dict[str, int]
    bases: tuple[Base, ...]
    config: LlamaConfig
    measure: Callable[[Base], tuple[float, ...]]
    documents: np.ndarray

    def draw(self, number: int) -> Base:
        """The same function as the base, to rounding, in other blocks.

        Where a row is one block (64 inputs), a permutation only changes the order in it; so that
        roundings differ there too, channels are rescaled a little.
        """
        base = self.bases[number % len(self.bases)]
        key = jax.random.key(number)
        factors = {
            name: jax.random.uniform(
                jax.random.fold_in(key, place), shape, minval=1 - JITTER, maxval=1 + JITTER
            )
            for place, (name, shape) in enumerate(channels(self.config).items())
        }
        return rescale(permute(base, self.config, key), self.config, factors)


def channels(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Channels of each layer that can be rescaled: [layers, size] by where they are read."""
    layers, values = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    return {
        "attention": (layers, config.hidden_size),
        "output": (layers, values),
        "mlp": (layers, config.hidden_size),
        "down": (layers, config.intermediate_size),
    }


def rescale(base: Base, config: LlamaConfig, factors: dict[str, jax.Array]) -> Base:
    """Multiplies columns of linear layers by `factors` (of `channels`) and divides what they read,
    weights of norms or rows of the layer in front: the function stays."""
    layers = base["layers"]
    attention, mlp = dict(layers["self_attn"]), dict(layers["mlp"])

    def times(module: dict, factor: jax.Array) -> dict:
        return {"weight": module["weight"] * factor}

    for name in ("q_proj", "k_proj", "v_proj"):
        attention[name] = times(attention[name], factors["attention"][:, None, :])
    for name in ("gate_proj", "up_proj"):
        mlp[name] = times(mlp[name], factors["mlp"][:, None, :])
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = factors["output"].reshape(len(factors["output"]), -1, config.head_dim)
    read = jnp.repeat(heads, groups, axis=1).reshape(len(heads), -1)
    attention["v_proj"] = times(attention["v_proj"], 1 / factors["output"][:, :, None])
    attention["o_proj"] = times(attention["o_proj"], read[:, None, :])
    mlp["up_proj"] = times(mlp["up_proj"], 1 / factors["down"][:, :, None])
    mlp["down_proj"] = times(mlp["down_proj"], factors["down"][:, None, :])
    return base | {
        "layers": {
            "self_attn": attention,
            "mlp": mlp,
            "input_layernorm": times(layers["input_layernorm"], 1 / factors["attention"]),
            "post_attention_layernorm": times(
                layers["post_attention_layernorm"], 1 / factors["mlp"]
            ),
        }
    }


_dequantize = jax.jit(QTensor.dequantize)


def is_packed(x: Any) -> bool:
    """Whether a leaf of a base is quantized."""
    return isinstance(x, QTensor)


def dequantized(base: Base) -> Base:
    """Float32 weights in the place of the packed ones."""
    return jax.tree.map(lambda x: _dequantize(x) if is_packed(x) else x, base, is_leaf=is_packed)


def stored(base: Base, config: QuantConfig) -> Base:
    """The float32 weights that the quantized base stands for."""
    return dequantized(quantized(base, config))


def stories(
    model: Path, text: Path, tokens: int = 51_200, documents: Path | None = None
) -> Testbed:
    """stories260K: loss per token (nats) of the first tokens of a text, windows of 256.

    The windows are those of `perplexity`: all tokens but the first count once, and each sees up to
    255 before it.
    """
    base, config = hf.load_base(model, None)
    tokenizer = hf.load_tokenizer(model)

    def encoded(path: Path, count: int) -> np.ndarray:
        with path.open(encoding="utf-8") as file:
            return np.array(encode_source(tokenizer, [file.read(8 * count)])[0][:count], np.int32)

    windows = text_windows(encoded(text, tokens), 256)
    llama = Llama(config, unroll=config.num_hidden_layers, matmul="xla")

    def measure(base: Base) -> tuple[float, ...]:
        return (evaluation_loss(llama, {"params": {}, "base": base}, windows, 16),)

    rows = encoded(documents or text, 64 * 256 if documents else 256).reshape(-1, 256)
    return Testbed("stories260K", {"loss": -1}, (base,), config, measure, rows)


def facts(name: str, questions: int = 2048, more: Path | None = None) -> Testbed:
    """Factworld's base-NAME: multiple choice (%), bits per fact of held-out questions.

    Args:
        name: small or large.
        questions: so many of them.
        more: folder with further bases, NAME-1 and so on, as ablation.py pretrains them.
    """
    folders = [factworld.FOLDER / f"base-{name}"]
    folders += sorted(p for p in more.glob(f"{name}-*") if p.is_dir()) if more else []
    loaded = [hf.load_base(folder, None) for folder in folders]
    config = loaded[0][1]
    llama = Llama(config, unroll=config.num_hidden_layers, matmul="xla")
    file = factworld.FOLDER / "data" / "questions.jsonl"
    asked = load_questions(str(file), hf.load_tokenizer(folders[0]), questions)

    def measure(base: Base) -> tuple[float, ...]:
        scores = score_questions(llama, {"params": {}, "base": base}, asked, 512)
        return 100 * scores.accuracy, scores.bits_per_fact

    rows = factworld.documents(factworld.make_world(), np.random.default_rng(7), 2048)[:, :-1]
    figures = {"accuracy (%)": 1, "bits per fact": 1}
    return Testbed(f"factworld {name}", figures, tuple(b for b, _ in loaded), config, measure, rows)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation, for a table."""
    return f"{np.mean(values):.{digits}f} ({np.std(values, ddof=1):.{digits}f})"


def paired(ours: Sequence[float], theirs: Sequence[float], digits: int = 3) -> str:
    """Mean of the differences and its standard error, for a table."""
    differences = np.subtract(ours, theirs)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{differences.mean():+.{digits}f} +- {error:.{digits}f}"
