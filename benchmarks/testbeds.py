"""Models to measure calibrations on, in several draws: the same function with different blocks.

stories260K has really trained weights (its files are arguments). factworld (examples/factworld)
measures how many facts a model remembers. Nothing is finetuned here. Weights are quantized as the
library stores them, then dequantized to float32, so that one compiled program serves all formats.
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
from irqlora_jax.quant.matmul import dense_weights

sys.path.append(str(Path(__file__).parent.parent / "examples" / "factworld"))
import world as factworld
from draws import quantized
from permute import permute

Base = dict[str, Any]
JITTER = 0.1  # factors of a draw's channels are within 1 +- this


@dataclasses.dataclass(frozen=True, eq=False)
class Testbed:
    """A model with draws of its weights and a way to measure it.

    Attributes:
        name: name for tables.
        figures: names of the figures that `measure` returns; 1 if more is better, else -1.
        bases: float bases; the draws take them in turn.
        config: of the model.
        measure: the figures of a float base.
        documents: rows of tokens as in the training, for methods that need inputs.
    """

    name: str
    figures: dict[str, int]
    bases: tuple[Base, ...]
    config: LlamaConfig
    measure: Callable[[Base], tuple[float, ...]]
    documents: np.ndarray

    def draw(self, number: int) -> Base:
        """The same function as the base, up to rounding, with different blocks.

        If a row is a single block (64 inputs), a permutation only changes the order in the block.
        So channels are also rescaled a little, to change the roundings.
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
    """Channels that can be rescaled: [layers, size], by the module that reads them."""
    layers, values = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    return {
        "attention": (layers, config.hidden_size),
        "output": (layers, values),
        "mlp": (layers, config.hidden_size),
        "down": (layers, config.intermediate_size),
    }


def rescale(base: Base, config: LlamaConfig, factors: dict[str, jax.Array]) -> Base:
    """Rescales channels (`channels`) without changing the function.

    Multiplies columns of linear layers by `factors`. Divides the weights that produce these inputs:
    weights of norms, or rows of the previous linear layer.
    """
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


def stored(base: Base, config: QuantConfig) -> Base:
    """The float32 weights that the quantized base represents."""
    return dense_weights(quantized(base, config), jnp.float32)


def stories(
    model: Path, text: Path, tokens: int = 51_200, documents: Path | None = None
) -> Testbed:
    """stories260K: loss per token (nats) of the first tokens of a text, in windows of 256.

    The windows are those of `perplexity`: all tokens except the first count once, and each sees up
    to 255 tokens before it.
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
    """Factworld's base-NAME: multiple choice (%) and bits per fact of held-out questions.

    Args:
        name: small or large.
        questions: number of questions.
        more: folder with more bases, NAME-1 and so on, which ablation.py pretrains.
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
