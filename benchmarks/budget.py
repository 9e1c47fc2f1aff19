"""Loss of a real model with a memory budget (`quant.budget`), beside uniform formats.

    python benchmarks/budget.py MODEL TEXT --output FOLDER [--budgets 2.5 2.75 3.0 3.5 4.0]
        [--ways none "importance + feedback" lqlora] [--errors weights inputs fisher]

MODEL is a Hugging Face folder or a .gguf file, TEXT the text to evaluate on. The loss is in nats
per token over windows of its first tokens; nothing is finetuned. Rows for the errors and the
calibrations come from the text of --calibrate, by default from TEXT behind the evaluated part.
Every way is applied to the uniform formats and to every budget with every kind of error.

FOLDER gets the tables of errors, which serve all budgets and ways, and results.jsonl with a line
for each result as soon as it is known. Another call skips what is there, and prints everything.

Ways are named as in real_calibration.py. "bits" count the linear layers with scales and
shifts; the budget limits them. "with the pair" adds 16 bits for each number of a LoRA pair.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from real_calibration import (
    CALIBRATIONS,
    FULL,
    PAIRS,
    Variant,
    cut,
    first_tokens,
    make,
    read,
    window_losses,
)
from timing import line, machine, table

from irqlora_jax import hf
from irqlora_jax.base.budget import choose_rules
from irqlora_jax.base.source import read_llama
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import stacks
from irqlora_jax.quant.budget import AllocationOptions
from irqlora_jax.quant.config import KEPT, QuantConfig

FORMATS = ("nf2/64", "nf2/16", "nf3/64", "nf3/16", "nf4/64", "int2/64", "int3/64", "int4/64")
"""Formats and block sizes. Blocks of 16 are the uniform way to about 2.5 and 3.5 bits."""
BUDGETS = (2.5, 2.75, 3.0, 3.5, 4.0)
ERRORS = ("weights", "inputs", "fisher")
WAYS = ("none", "importance + feedback", "lqlora", "importance + feedback + cloq")
REST = ", rest"
"""Behind the kind of errors that are measured after the pair took its part."""
PAIR_BITS = 16
COLUMNS = ("storage", "errors", "way", "bits", "with the pair", "loss", "over full", "seconds")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a format or a budget, the errors of its choice, and how it is applied."""

    storage: str
    errors: str | None
    way: str
    rank: int = 0


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything that is asked for, in order; the quick ways first."""
    yield Case(FULL, None, "none")
    kinds = [*args.errors, *(["sensitivity"] if args.sensitivity else [])]
    for way in args.ways:
        for rank in args.ranks if way in PAIRS else (0,):
            for format in args.formats:
                yield Case(format, None, way, rank)
            rests = [f"{kind}{REST}" for kind in kinds if args.rest and way in PAIRS]
            for budget, kind in itertools.product(args.budgets, [*kinds, *rests]):
                yield Case(str(budget), kind, way, rank)


def choose(
    args: argparse.Namespace, case: Case, way: Variant, rows: CalibrationRows
) -> QuantConfig:
    """The formats of all matrices."""
    if case.storage == FULL:
        return QuantConfig(format=KEPT, calibration="none")
    if case.errors is None:
        format, _, size = case.storage.partition("/")
        return QuantConfig(**{"format": format, "block_size": int(size), **way.quant})
    kind: Any = case.errors.removesuffix(REST)
    pair = way.adapter if case.errors.endswith(REST) else None
    file = str(args.sensitivity) if kind == "sensitivity" else None
    allocation = AllocationOptions(errors=kind, sensitivity=file)
    # Rounding and training change neither the errors nor the sizes, so these ways share a table.
    own = {k: v for k, v in way.quant.items() if k not in ("rounding", "training", "block")}
    shared = next(name for name, one in CALIBRATIONS.items() if one.quant == own)
    asked = QuantConfig(budget=float(case.storage), allocation=allocation, **own)
    settings = dataclasses.replace(rows.config, metric=metric(kind))
    given = CalibrationRows(rows.tokens, settings)
    if pair is not None:
        shared += f"-{pair.init}-{pair.rank}"
    folder = args.output / f"errors-{kind}-{shared.replace(' ', '-')}"
    options: dict[str, Any] = {"calibrate": given, "adapter": pair, "progress": True}
    chosen = choose_rules(args.model, asked, folder, **options)
    return dataclasses.replace(chosen, **way.quant)


def metric(kind: str) -> Any:
    """What `calibrate.metric` has to be for a kind of error."""
    return "gradients" if kind == "fisher" else "inputs"


def one_stack(base: dict[str, Any], depth: int) -> dict[str, Any]:
    """Joins the stacks of a dense base, so that one compiled program serves all choices."""
    names = list(stacks(base, depth))
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(base.pop(name) for name in names))
    return base | {"layers": whole}


def measure(
    args: argparse.Namespace, llama: LlamaConfig, case: Case, way: Variant, rows: Any, windows: Any
) -> dict[str, Any]:
    """Bits, loss of every window, and seconds."""
    start = time.perf_counter()
    quant = choose(args, case, way, rows)
    chosen_at = time.perf_counter()
    model, variables = make(args, llama, quant, way, rows)
    variables["base"] = one_stack(variables["base"], llama.num_hidden_layers)
    made = time.perf_counter()
    losses = window_losses(model, variables, windows)
    stored = measure_base(abstract_base(llama, quant))
    pair = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    bits = stored.bits if case.storage != FULL else 16.0
    return {
        "bits": bits,
        "with_pair": bits + PAIR_BITS * pair / stored.weights,
        "rules": len(quant.rules),
        "losses": losses,
        "seconds": {
            "choose": chosen_at - start,
            "quantize": made - chosen_at,
            "loss": time.perf_counter() - made,
        },
    }


def summary(results: list[dict[str, Any]]) -> None:
    """Prints the table: by way, the smallest bases first."""
    full = next(row["losses"] for row in results if row["storage"] == FULL)
    ways = list(dict.fromkeys((row["way"], row["rank"]) for row in results))

    def order(row: dict[str, Any]) -> tuple[int, float]:
        return ways.index((row["way"], row["rank"])), row["bits"]

    print(f"\nfull precision: {np.mean(full):.4f}\n")
    print(table(COLUMNS))
    for row in sorted(results, key=order):
        if row["storage"] == FULL:
            continue
        rise = np.subtract(row["losses"], full)
        spread = rise.std(ddof=1) / np.sqrt(len(rise)) if len(rise) > 1 else 0.0
        cells = [row["storage"], ""]
        if row["errors"] is not None:
            cells = [f"budget {row['storage']}", row["errors"]]
        cells += [f"{row['way']}, rank {row['rank']}" if row["rank"] else row["way"]]
        cells += [f"{row['bits']:.3f}", f"{row['with_pair']:.3f}", f"{np.mean(row['losses']):.3f}"]
        cells += [f"{rise.mean():+.3f} ± {spread:.3f}", f"{row['seconds']['quantize']:.0f}"]
        print(line(cells))
    print("\nSeconds of a table of errors and its first choice:")
    for kind in dict.fromkeys(row["errors"] for row in results if row["errors"]):
        longest = max(row["seconds"]["choose"] for row in results if row["errors"] == kind)
        print(f"- {kind}: {longest:.0f}")


def main() -> None:
    """Measures what the folder does not have, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="Hugging Face folder or .gguf file")
    add("text", type=Path, help="text to evaluate on")
    add("--output", type=Path, required=True, help="folder of results")
    add("--calibrate", type=Path, help="text for errors and calibrations (default: rest of TEXT)")
    add("--formats", nargs="*", default=FORMATS, help="FORMAT/BLOCK_SIZE (default: %(default)s)")
    add("--budgets", nargs="*", type=float, default=BUDGETS, help="bits a weight")
    add("--errors", nargs="*", default=ERRORS, choices=ERRORS)
    add("--sensitivity", type=Path, help="sensitivity.json, for these errors too")
    add("--rest", action="store_true", help="also choose by what remains after the pair")
    add("--ways", nargs="*", default=WAYS, choices=[*CALIBRATIONS, *PAIRS])
    add("--ranks", nargs="*", type=int, default=[16], help="of the pairs")
    add("--windows", type=int, default=12)
    add("--length", type=int, default=1024, help="tokens of a window")
    add("--rows", type=int, default=32, help="rows for errors and calibrations")
    add("--row_length", type=int, default=512, help="tokens of such a row")
    args = parser.parse_args()
    print(machine())
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer, llama = hf.load_tokenizer(args.model), read_llama(args.model)
    scored, drawn = args.windows * args.length, args.rows * args.row_length
    source = args.calibrate or args.text
    skipped = scored if source.samefile(args.text) else 0
    drawn_from = first_tokens(tokenizer, source, skipped + drawn)[skipped:]
    rows = CalibrationRows(drawn_from.reshape(args.rows, args.row_length))
    windows = cut(first_tokens(tokenizer, args.text, scored), args.length)
    same = {name: getattr(args, name) for name in ("windows", "length", "rows", "row_length")}
    same |= {"model": args.model.name, "text": args.text.name, "calibrate": source.name}
    file = args.output / "results.jsonl"
    known = [row for row in read(file) if same.items() <= row.items()]
    fields = [field.name for field in dataclasses.fields(Case)]
    measured = [Case(*(row[field] for field in fields)) for row in known]
    for case in cases(args):
        if case in measured:
            continue
        way = CALIBRATIONS.get(case.way) or dataclasses.replace(PAIRS[case.way], rank=case.rank)
        found = measure(args, llama, case, way, rows, windows)
        row = {**same, **dataclasses.asdict(case), **found}
        known.append(row)
        with file.open("a") as opened:
            opened.write(json.dumps(row) + "\n")
        loss = np.mean(found["losses"])
        print(case, f"{found['bits']:.3f} bits, {loss:.4f}", found["seconds"], file=sys.stderr)
    summary(known)


if __name__ == "__main__":
    main()
