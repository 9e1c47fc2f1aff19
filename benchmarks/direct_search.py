"""Formats for a budget by direct search on the loss, beside the integer program of `quant.budget`.

    pip install PyNomadBBO
    python benchmarks/direct_search.py MODEL TEXT --output FOLDER [--budgets 2.5 2.75 3.0]

Attention and MLP of each layer have one of the candidates of `quant.allocation`. Mesh adaptive
direct search (NOMAD 4) changes these choices to lower the loss of the calibration rows, the budget
being a constraint; it begins at the smallest candidates, or at the choice of the integer program.
The integer program has the errors of the weights or the Fisher errors, for the same groups and for
single matrices. Costs are forward passes over the calibration rows. Only for small models: FOLDER
gets the tables of errors, and the weights of all candidates are in memory.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PyNomad  # type: ignore
from real_calibration import cut, first_tokens
from timing import line, machine, table

from irqlora_jax import hf
from irqlora_jax.base.budget import find_room
from irqlora_jax.base.error_table import make_errors
from irqlora_jax.data.batches import eval_batches
from irqlora_jax.data.calibrate import CalibrateConfig, CalibrationRows
from irqlora_jax.evaluate.perplexity import row_nll
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_path
from irqlora_jax.quant.allocate import allocate
from irqlora_jax.quant.budget import AllocationOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.sharding import LINEAR_NAMES

Loss = Callable[[np.ndarray, Any], float]
GROUPS = {"weights": 0, "fisher": 4}
"""Kinds of errors, and their cost: a forward and a backward pass take about 4 forward passes."""


def loss_of(model: Path, quant: QuantConfig) -> tuple[Loss, Any]:
    """The loss of the model with a candidate for each matrix [layers, 7], and the architecture."""
    base, llama = hf.load_base(model, None)
    depth, offers = np.arange(llama.num_hidden_layers), {}
    for name in LINEAR_NAMES:
        group, _ = linear_path(name)
        weights = base["layers"][group][name]["weight"]
        made = [[quantize(w, one).dequantize() for w in weights] for one in quant.candidates]
        offers[name] = jnp.stack([jnp.stack(layers) for layers in made])
    bare = Llama(llama, matmul="xla")

    @jax.jit
    def with_choices(choices: Any) -> Any:
        layers = dict(base["layers"])
        for column, name in enumerate(LINEAR_NAMES):
            group, _ = linear_path(name)
            chosen = {"weight": offers[name][choices[:, column], depth]}
            layers[group] = {**layers[group], name: chosen}
        return base | {"layers": layers}

    def loss(choices: np.ndarray, batches: Any) -> float:
        variables = {"params": {}, "base": with_choices(choices)}
        sums = [row_nll(bare, variables, batch) for batch in batches]
        return float(sum(x.sum() for x, _ in sums) / sum(n.sum() for _, n in sums))

    return loss, llama


def search(
    objective: Callable[[np.ndarray], float],
    bits: np.ndarray,
    limit: int,
    start: np.ndarray,
    evaluations: int,
    seed: int,
) -> np.ndarray:
    """The best choice for every group that NOMAD finds. The candidates are in order of size."""
    best: list[Any] = [np.inf, start]
    groups = np.arange(len(bits))

    def evaluate(point: Any) -> bool:
        choice = np.array([int(point.get_coord(i)) for i in groups])
        over = int(bits[groups, choice].sum()) / limit - 1
        found = objective(choice)
        if over <= 0 and found < best[0]:
            best[:] = found, choice
        point.setBBO(f"{found:.9f} {over:.9f}".encode())
        return True

    settings = [f"BB_INPUT_TYPE ({' '.join('I' * len(bits))})", "BB_OUTPUT_TYPE OBJ PB"]
    settings += [f"MAX_BB_EVAL {evaluations}", f"SEED {seed}", "DISPLAY_DEGREE 0"]
    low, high = [0] * len(bits), [bits.shape[1] - 1] * len(bits)
    PyNomad.optimize(evaluate, start.tolist(), low, high, settings)
    return best[1]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face folder")
    add("text", type=Path, help="text to evaluate on; its rest calibrates")
    add("--output", type=Path, required=True, help="folder for the tables of errors")
    add("--budgets", nargs="*", type=float, default=(2.5, 2.75, 3.0))
    add("--evaluations", nargs="*", type=int, default=(40, 400))
    add("--seeds", type=int, default=3)
    add("--windows", type=int, default=64)
    add("--rows", type=int, default=96)
    add("--length", type=int, default=256, help="tokens of a window and of a row")
    args = parser.parse_args()
    print(machine())
    quant = QuantConfig(calibration="none", budget=args.budgets[0])
    loss, llama = loss_of(args.model, quant)
    scored = args.windows * args.length
    tokens = first_tokens(
        hf.load_tokenizer(args.model), args.text, scored + args.rows * args.length
    )
    held, own = (list(eval_batches(cut(x, args.length), 32)) for x in np.split(tokens, [scored]))
    rows = tokens[scored:].reshape(args.rows, args.length)
    depth = llama.num_hidden_layers
    columns = ("budget", "choice", "passes", "bits", "loss of the rows", "held-out loss")
    print(f"\n{table(columns)}")
    for budget in args.budgets:
        quant = QuantConfig(calibration="none", budget=budget)
        room = find_room(llama, quant, lambda _: jnp.float32)
        order = np.argsort(room.bits.sum(axis=0), kind="stable")
        index = np.array([2 * i + (LINEAR_NAMES.index(name) > 3) for i, name in room.places])
        sizes = np.stack([room.bits[index == g].sum(axis=0) for g in range(2 * depth)])[:, order]

        def spread(choice: np.ndarray, order: Any = order, index: Any = index) -> np.ndarray:
            return order[choice][index].reshape(depth, 7)

        def show(name: str, passes: Any, choices: np.ndarray, room: Any = room, at=budget) -> None:
            places = np.arange(len(room.places))
            bits = room.bits[places, choices.reshape(-1)].sum() / room.weights
            figures = [f"{loss(choices, batches):.3f}" for batches in (own, held)]
            print(line([str(at), name, str(passes), f"{bits:.3f}", *figures]), flush=True)

        def objective(choice: np.ndarray, spread: Any = spread) -> float:
            return loss(spread(choice), own)

        for kind, passes in GROUPS.items():
            chosen: Any = {"metric": "gradients" if kind == "fisher" else "inputs"}
            asked = QuantConfig(
                calibration="none", budget=budget, allocation=AllocationOptions(errors=kind)
            )
            given = CalibrationRows(rows, CalibrateConfig(**chosen))
            file = args.output / f"{kind}.jsonl"
            errors = make_errors(args.model, asked, room.places, file, calibrate=given)
            fine = np.array(allocate(errors, room.bits, room.limit).choices)
            show(f"{kind}, matrices", passes, fine.reshape(depth, 7))
            tied = np.stack([errors[index == g].sum(axis=0) for g in range(2 * depth)])[:, order]
            program = np.array(allocate(tied, sizes, room.limit).choices)
            show(f"{kind}, groups", passes, spread(program))
        run = functools.partial(search, objective, sizes, room.limit)
        starts = {"smallest": np.zeros(2 * depth, int), "fisher, groups": program}
        for name, start in starts.items():
            for count in args.evaluations:
                for seed in range(args.seeds):
                    found = run(start, count, seed)
                    passes = count + (GROUPS["fisher"] if name != "smallest" else 0)
                    show(f"search from {name}, seed {seed}", passes, spread(found))


if __name__ == "__main__":
    main()
