"""Does it help to train the scales and shifts of the blocks together with the adapter?

    python benchmarks/trained_scales.py [--bases FOLDER] [--formats nf4 nf3 nf2]

Finetunes Factworld's small base and the bases in FOLDER (small-1 and so on, which ablation.py
pretrains) as in the ablation, in two ways: LoRA alone, and LoRA with a trained factor for every
scale and a trained offset, in units of the scale, for every shift. They start at 1 and 0, and the
same optimizer trains them. The trained numbers stay float32, which takes one bit a weight, so this
is the largest gain that is possible. Each method has the learning rate of the grid that is best on
the validation entities of the first base. The figures are for the test entities: mean (standard
deviation) over the bases, and the paired difference to LoRA alone with its standard error.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from testbeds import Base, paired, quantized, spread
from timing import line, machine, table

from irqlora_jax import hf
from irqlora_jax.config import TrainConfig
from irqlora_jax.data import Batches
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor

# isort: split
import ablation  # testbeds adds its folder to the path
import world as factworld

HOWS: dict[str, Mapping[str, Any]] = {
    "ICQ": {"calibration": "icq"},
    "joint": {"calibration": "joint"},
}
RATES = (5e-4, 1e-3, 2e-3)
GROUPS = ("self_attn", "mlp")


@dataclasses.dataclass(frozen=True)
class Regridded:
    """A model whose adapters have a "grid" that moves its scales and shifts."""

    model: Llama

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`Llama.apply` for adapters from `start` and a base from `apart`."""
        params, base = variables["params"], moved(variables["base"], variables["params"]["grid"])
        return self.model.apply({"params": params["lora"], "base": base}, *args, **kwargs)


@jax.jit
def apart(packed: Base) -> Base:
    """Replaces each QTensor by its `parts`."""
    layers = dict(packed["layers"])
    for group in GROUPS:
        layers[group] = {
            name: parts(linear["weight"]) for name, linear in packed["layers"][group].items()
        }
    return packed | {"layers": layers}


def parts(weight: QTensor) -> dict[str, jax.Array]:
    """Levels [..., out, blocks, block], and scales and shifts [..., out, blocks], of a QTensor."""
    scale, shift = weight.scale(), weight.shift()
    assert shift is not None and weight.shape[-1] % weight.block_size == 0
    unit = blocks(weight.dequantize(), scale) - shift[..., None]
    unit /= jnp.where(scale == 0, 1, scale)[..., None]
    return {"levels": unit, "scale": scale, "shift": shift}


def blocks(weight: jax.Array, scale: jax.Array) -> jax.Array:
    """Reshapes [..., out, in] to [..., out, blocks, block]."""
    return weight.reshape(*scale.shape, -1)


def moved(base: Base, grid: Any) -> Base:
    """The float base: levels * scale * (1 + factor) + shift + offset * scale."""
    layers = dict(base["layers"])
    for group in GROUPS:
        layers[group] = {}
        for name, linear in base["layers"][group].items():
            own = grid[group][name]
            scale = linear["scale"] * (1 + own["factor"])
            shift = linear["shift"] + linear["scale"] * own["offset"]
            weight = linear["levels"] * scale[..., None] + shift[..., None]
            layers[group][name] = {"weight": weight.reshape(*weight.shape[:-2], -1)}
    return base | {"layers": layers}


def start(model: Llama, base: Base) -> Any:
    """LoRA's initial adapters, and a grid that moves nothing."""
    grid = {
        group: {
            name: {part: jnp.zeros_like(linear["scale"]) for part in ("factor", "offset")}
            for name, linear in base["layers"][group].items()
        }
        for group in GROUPS
    }
    return {"lora": model.init_adapters(jax.random.key(0)), "grid": grid}


class Bench:
    """Holds the data; finetunes and measures."""

    def __init__(self, folders: list[Path], steps: int, questions: int | None) -> None:
        tokenizer = hf.load_tokenizer(folders[0])
        self.folders, self.data = folders, ablation.load_data(tokenizer, questions)
        drawn = Batches(self.data.train, ablation.BATCH, 0, multiple=4)
        rows = [drawn[step] for step in range(steps)]
        self.batches = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        self.config = TrainConfig(
            steps=steps, batch_size=ablation.BATCH, compute_dtype="float32", remat=False
        )

    def run(self, number: int, quant: QuantConfig, trains_grid: bool, rate: float) -> Any:
        """Finetunes one base and returns its figures."""
        weights, config = hf.load_base(self.folders[number], None)
        base = apart(quantized(weights, quant))
        adapter = ablation.METHODS["qlora"].adapter_config()
        model = Llama(config, adapter, unroll=config.num_hidden_layers, matmul="xla")
        adapters = start(model, base)
        trained = jax.tree_util.tree_map_with_path(
            lambda path, _: jnp.float32(trains_grid or path[0].key == "lora"), adapters
        )
        adapters, _ = ablation.finetune(
            base,
            adapters,
            self.batches,
            jnp.float32(rate),
            trained,
            jax.tree.map(jnp.ones_like, trained),
            model=Regridded(model),
            config=self.config,
        )
        final = {"params": adapters["lora"], "base": moved(base, adapters["grid"])}
        return ablation.measure(model, final, self.data)


def main() -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", type=Path, help="folder with more bases (of ablation.py)")
    parser.add_argument("--formats", nargs="+", default=("nf4", "nf3", "nf2"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--questions", type=int, help="test questions (default: all)")
    args = parser.parse_args()
    folders = [factworld.FOLDER / "base-small"]
    folders += sorted(p for p in args.bases.glob("small-?") if p.is_dir()) if args.bases else []
    bench = Bench(folders, args.steps, args.questions)
    print(f"{machine()}; {len(folders)} bases, {args.steps} steps\n")
    columns = ("format", "calibration", "trained", "rate", "accuracy (%)", "to LoRA")
    print(table((*columns, "bits per fact", "to LoRA")))
    for name in args.formats:
        for how, fields in HOWS.items():
            quant = QuantConfig(format=name, **fields)
            alone: dict[str, list[float]] = {}
            for trains_grid in (False, True):
                tried = {rate: bench.run(0, quant, trains_grid, rate) for rate in RATES}
                rate = max(tried, key=lambda rate: tried[rate]["validation"]["accuracy"])
                runs = [tried[rate]]
                runs += [bench.run(i, quant, trains_grid, rate) for i in range(1, len(folders))]
                cells = [name, how, "LoRA, scales, shifts" if trains_grid else "LoRA", f"{rate:g}"]
                for figure, factor in (("accuracy", 100), ("bits_per_fact", 1)):
                    values = [factor * run["test"][figure] for run in runs]
                    other = alone.setdefault(figure, values)
                    cells += [spread(values), paired(values, other) if trains_grid else ""]
                print(line(cells), flush=True)


if __name__ == "__main__":
    main()
