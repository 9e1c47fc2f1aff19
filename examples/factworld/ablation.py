"""Compares the parts of IR-QLoRA with 4, 3 and 2 bits, over several seeds, in pairs.

    python examples/factworld/ablation.py            # twelve methods, an hour on one core
    python examples/factworld/ablation.py --small    # under 5 minutes on 2 cores
    python examples/factworld/ablation.py --report   # tables and plot of the finished runs

Each seed has its own base (initialization and documents), a permutation that gives other blocks,
new adapters, and another order of the data. Every finished run is a line of
runs/factworld-ablation/results.jsonl and is never repeated, so you can stop and restart at any
time.
"""

import argparse
import dataclasses
import functools
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison
import jax
import jax.numpy as jnp
import numpy as np
import optax
import world as factworld
from comparison import Results, Run, Settings, chosen_rate
from draws import quantized
from facts import Data, load_data
from methods import DEFAULT, METHODS, Method
from permute import permute
from pretrain import RECIPES, pretrain, save_base
from runs_file import append
from tqdm import tqdm

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.data import Batches
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.evaluate import evaluation_loss, score_questions
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.state import make_state
from irqlora_jax.train.step import train_step

FORMATS = ("nf4", "int4", "nf3", "int3", "nf2", "int2")
BATCH = 64
CALIBRATE = (128, 128)  # rows and tokens of a row


# ---------------------------------------------------------------------------------------- one run


def base_folder(name: str, seed: int, ready: Path | None, output: Path) -> Path:
    """The folder of a base: committed here, in `ready`, or in `output`; else pretrained there."""
    if seed == RECIPES[name].seed:
        return factworld.FOLDER / f"base-{name}"
    target = output / "bases" / f"{name}-{seed}"
    for folder in (ready / target.name if ready else target, target):
        if (folder / "model.safetensors").is_file():
            return folder
    tqdm.write(f"pretraining {target}")
    world = factworld.make_world()
    base, config, _ = pretrain(dataclasses.replace(RECIPES[name], seed=seed), world)
    partial = target.with_suffix(".partial")
    save_base(partial, base, config, world)
    os.replace(partial, target)
    return target


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a finetune."""

    base: Any
    """The quantized weights, dequantized to float32. `dequant_matmul` computes the same from packed
    weights, but this way one compiled program serves all formats."""
    pairs: Any
    """Pairs that were fitted to the base. None: those of `Llama.init_adapters`."""
    entropy: float | None
    """Entropy of the codes in bits, mean over the blocks. None without quantization."""
    error: float
    """Squared error of all linear weights with their adapters, over their squared norm."""


# Compiled once for each shape and format of a matrix.
_dequantize, _entropy = jax.jit(QTensor.dequantize), jax.jit(QTensor.entropy)


def prepare(
    base: Any,
    config: LlamaConfig,
    quant: QuantConfig,
    adapter: AdapterConfig | None,
    rows: CalibrationRows | None,
    key: jax.Array,
) -> Start:
    """Quantizes the linear layers.

    Args:
        base: the weights in full precision.
        config: the architecture.
        quant: how to quantize.
        adapter: has pairs that are fitted to the base; None: there are none.
        rows: for methods that need a text.
        key: random key.
    """
    if quant.format == "none":
        return Start(base, None, None, 0.0)
    pairs = None
    if adapter is None and not quant.needs_text:
        packed = quantized(base, quant)
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_base(Path(folder), base, config, factworld.make_world())
            if adapter is None:
                packed = hf.load_base(folder, quant, calibrate=rows)[0]
            else:
                needs = quant.needs_text or adapter.needs != "nothing"
                given = rows if needs else None
                packed, pairs, _ = hf.load_fitted(folder, quant, adapter, key, calibrate=given)
    entropies, lost, norm = [], 0.0, 0.0
    floats = dict(packed["layers"])
    for group in ("self_attn", "mlp"):
        floats[group] = {}
        for name, linear in packed["layers"][group].items():
            weight = linear["weight"]
            exact, stored = base["layers"][group][name]["weight"], _dequantize(weight)
            floats[group][name] = {"weight": stored}
            entropies.append(np.asarray(_entropy(weight)).ravel())
            residual = exact - stored
            if adapter is not None and pairs is not None:
                pair = pairs["layers"][group][name]
                residual -= adapter.scale * pair["lora_B"] @ pair["lora_A"]
            lost += float((residual**2).sum())
            norm += float((exact**2).sum())
    entropy = float(np.concatenate(entropies).mean())
    return Start(packed | {"layers": floats}, pairs, entropy, lost / norm)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def finetune(
    base: Any,
    adapters: Any,
    batches: Any,
    rate: jax.Array,
    trained: Any,
    speeds: Any,
    model: Any,
    config: Any,
) -> tuple[Any, jax.Array]:
    """Does all steps of `train_step`. Rate and mask are arguments: one program for all methods.

    Args:
        base: frozen weights.
        adapters: initial adapters.
        batches: "tokens" and "targets", [steps, batch, seq].
        rate: learning rate.
        trained: 1 or 0 for each leaf of `adapters`. Leaves with 0 are not trained, and do not count
            in the norm that clips the gradient.
        speeds: factor of the learning rate for each leaf of `adapters`.
        model: the model with the adapters' method.
        config: other settings of the optimization.

    Returns:
        The adapters, and the loss of every step.
    """
    mask = optax.stateless(lambda grads, _: jax.tree.map(jnp.multiply, grads, trained))
    adam = optax.adamw(rate, config.beta1, config.beta2, config.eps, weight_decay=0.0)
    faster = optax.stateless(lambda steps, _: jax.tree.map(jnp.multiply, steps, speeds))
    optimizer = optax.chain(mask, optax.clip_by_global_norm(config.clip_norm), adam, faster)
    settings = dataclasses.replace(config, clip_norm=None)  # the chain clips, after the mask
    advance = functools.partial(train_step, model=model, optimizer=optimizer, config=settings)

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        state, metrics = advance(state, base, batch)
        return state, metrics["loss"]

    state = make_state(adapters, optimizer, jax.random.key(0))
    state, losses = jax.lax.scan(step, state, batches)
    return state.adapters, losses


def masks(adapters: Any, method: Method, adapter: AdapterConfig) -> tuple[Any, Any]:
    """1 for each leaf that is trained and 0 for the others, and the factors of the rate."""
    faster = adapter.chosen.faster if method.lora_plus_ratio != 1 else ()
    trained = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.float32(path[-1].key not in method.frozen), adapters
    )
    speeds = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.float32(method.lora_plus_ratio if path[-1].key in faster else 1),
        adapters,
    )
    return trained, speeds


def measure(model: Llama, variables: Any, data: Data) -> dict[str, Any]:
    """Scores on validation and test entities, and the loss on test entities."""
    found = {}
    for part, questions in (("validation", data.validation), ("test", data.test)):
        scores = score_questions(model, variables, questions, 512)
        found[part] = {
            "accuracy": scores.accuracy,
            "by_subject": scores.by_subject,
            "recall": scores.recall,
            "bits_per_fact": scores.bits_per_fact,
        }
    found["test"]["loss"] = evaluation_loss(model, variables, data.loss, 128)
    return found


class Bench:
    """Runs methods. Keeps bases, prepared weights and batches that several runs share."""

    def __init__(
        self,
        settings: Settings,
        ready: Path | None,
        output: Path,
        methods: Mapping[str, Method] = METHODS,
    ) -> None:
        self.settings, self.methods = settings, methods

        @functools.lru_cache(maxsize=1)
        def base(seed: int) -> tuple[Any, Any]:
            number = seed % settings.bases if settings.bases else seed
            weights, config = hf.load_base(base_folder(settings.base, number, ready, output), None)
            return jax.jit(permute, static_argnums=1)(weights, config, jax.random.key(seed)), config

        @functools.lru_cache(maxsize=1)
        def batches(seed: int) -> dict[str, np.ndarray]:
            drawn = Batches(self.data.train, BATCH, seed, multiple=4)
            parts = [drawn[step] for step in range(settings.steps)]
            return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

        @functools.lru_cache(maxsize=8)
        def prepared(seed: int, quant: QuantConfig, adapter: AdapterConfig | None) -> Start:
            key = jax.random.key(seed)
            return prepare(*base(seed), quant, adapter, self.calibration, key)

        self._base, self._batches, self._prepared = base, batches, prepared

    @functools.cached_property
    def data(self) -> Data:
        tokenizer = hf.load_tokenizer(factworld.FOLDER / f"base-{self.settings.base}")
        return load_data(tokenizer, self.settings.questions)

    @property
    def calibration(self) -> CalibrationRows:
        """The first tokens of the training set."""
        tokens = np.concatenate([example.tokens for example in self.data.train])
        return CalibrationRows(tokens[: math.prod(CALIBRATE)].reshape(CALIBRATE))

    def run(self, run: Run) -> dict[str, Any]:
        """The figures of one run."""
        started, method = time.perf_counter(), self.methods[run.method]
        quant = QuantConfig(**({"format": run.format} | dict(method.quant)))
        _, config = self._base(run.seed)
        adapter = method.adapter_config()
        # Methods with the same start share it.
        fitted = adapter is not None and adapter.start.fit is not None
        start = self._prepared(run.seed, quant, adapter if fitted else None)
        figures: dict[str, Any] = {"entropy": start.entropy, "error": start.error}
        adapters, model = {}, Llama(config, unroll=config.num_hidden_layers, matmul="xla")
        if adapter is not None and run.rate is not None:
            # One program for all initializations.
            model = model.clone(adapter=dataclasses.replace(adapter, init="default"))
            key = jax.random.key(run.seed)
            adapters = model.init_adapters(key, start.pairs, start.base)
            trained, speeds = masks(adapters, method, adapter)
            train = TrainConfig(
                steps=self.settings.steps, batch_size=BATCH, compute_dtype="float32", remat=False
            )
            batches, rate = self._batches(run.seed), jnp.float32(run.rate)
            adapters, losses = finetune(
                start.base, adapters, batches, rate, trained, speeds, model=model, config=train
            )
            sizes = jax.tree.map(lambda x, mask: x.size * int(mask), adapters, trained)
            figures["trained"] = sum(jax.tree.leaves(sizes))
            figures["train_loss"] = float(losses[-50:].mean())
        figures |= measure(model, {"params": adapters, "base": start.base}, self.data)
        return figures | {"seconds": round(time.perf_counter() - started, 2)}


# ------------------------------------------------------------------------------------ all of them


def plan(
    settings: Settings,
    methods: Mapping[str, Method],
    formats: Sequence[str],
    seeds: int,
    results: Results,
) -> Iterator[Run]:
    """The runs, in order.

    The first seeds try all rates. Later seeds take the rate that is best on the validation
    entities; it is read from `results` when the iterator gets there.
    """
    for seed in range(seeds):
        for place, name in enumerate(formats):
            for method, own in methods.items():
                if own.full and place > 0:
                    continue
                stored = "none" if own.full else name
                if own.adapter is None:
                    rates: tuple[float | None, ...] = (None,)
                elif seed < settings.tuning_seeds:
                    rates = settings.rates
                else:
                    rates = (chosen_rate(results, settings, method, stored),)
                for rate in rates:
                    yield Run(method, stored, seed, rate)


def parse(
    words: Sequence[str] | None, methods: Mapping[str, Method], default: Sequence[str]
) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = functools.partial(parser.add_argument, nargs="+")
    text = f"rows (default: {' '.join(default)})"
    several("--methods", choices=methods, default=list(default), help=text)
    several("--formats", choices=FORMATS, help=f"(default: {' '.join(FORMATS)})")
    several("--rates", type=float, help="learning rates to choose from (default: 5e-4 1e-3 2e-3)")
    parser.add_argument("--seeds", type=int, help="at least 2 (default: 5)")
    parser.add_argument("--steps", type=int, help="steps of a finetune (default: 400)")
    parser.add_argument("--tuning_seeds", type=int, help="seeds that try all rates (default: 2)")
    parser.add_argument("--questions", type=int, help="test questions (default: all)")
    parser.add_argument("--base", choices=RECIPES, default="small", help="for 2 bits: large")
    parser.add_argument(
        "--bases", type=Path, help="folder with pretrained bases, small-1 and so on"
    )
    parser.add_argument(
        "--one_base", action="store_true", help="all seeds permute the committed base"
    )
    parser.add_argument("--small", action="store_true", help="2 seeds of 1 base, few steps")
    parser.add_argument("--report", action="store_true", help="tables and plot, no runs")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/factworld-ablation"), help="folder to write"
    )
    return parser.parse_args(words)


def main(
    words: Sequence[str] | None = None,
    methods: Mapping[str, Method] = METHODS,
    default: Sequence[str] = DEFAULT,
) -> None:
    """Does the missing runs, then prints and writes the tables and the plot.

    Args:
        words: the command line.
        methods: the rows that can be asked for.
        default: names of the rows without --methods.
    """
    # As in pretrain.py: one core, so that figures do not depend on the number of cores.
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)
    args = parse(words, methods, default)
    file = args.output / "results.jsonl"
    if args.report:
        settings, results = comparison.read(file)
        comparison.report(settings, results, args.output)
        return
    small = args.small
    settings = Settings(
        base=args.base,
        bases=1 if small or args.one_base else None,
        steps=args.steps or (60 if small else 400),
        rates=tuple(sorted(args.rates or ((1e-3, 2e-3) if small else (5e-4, 1e-3, 2e-3)))),
        tuning_seeds=args.tuning_seeds or (1 if small else 2),
        questions=args.questions or (1024 if small else None),
    )
    formats = args.formats or (("nf4", "nf3", "nf2") if small else FORMATS)
    results = comparison.resume(file, settings)
    wanted = {name: methods[name] for name in args.methods}
    order = functools.partial(plan, settings, wanted, formats, args.seeds or (2 if small else 5))
    bench = Bench(settings, args.bases, args.output, methods)
    with tqdm(total=sum(1 for _ in order({})), unit="run", smoothing=0.05) as bar:
        for run in order(results):
            bar.set_description(" ".join(str(part) for part in run if part is not None))
            if run not in results:
                results[run] = bench.run(run)
                append(file, run, results[run])
            elif not bar.disable:
                bar.initial += 1  # runs that are only read do not count for the time left
            bar.update()
    comparison.report(settings, results, args.output)


if __name__ == "__main__":
    main()
