"""Chooses formats for a budget (`quant.budget`), as LQ-LoRA does (arXiv 2311.12023, section 4.2).

The sum of the errors of all matrices (`error_table.py`) is the least for what may be stored
(`quant/allocate.py`). The result is a configuration with plain `quant.rules`. A file beside the
base remembers which budget it was made for.
"""

import collections
import dataclasses
import fnmatch
import fractions
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.error_table import ERRORS_FILE, Place, make_errors
from irqlora_jax.base.rule_patterns import ANY, find_patterns
from irqlora_jax.base.source import open_weights
from irqlora_jax.base.storage import matrix_bits, plan_stacks
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.files.checksums import check_seal, seal
from irqlora_jax.files.hub import read_dtype, snapshot
from irqlora_jax.files.small import read_json, write_text
from irqlora_jax.files.tensors import FLOATS
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.tree import Keys, linear_path, matrix_name, weight_name, weight_shapes
from irqlora_jax.processes import first_only, together
from irqlora_jax.quant.allocate import allocate
from irqlora_jax.quant.budget import FIT, AllocationOptions, parse_budget
from irqlora_jax.quant.config import KEPT, QuantConfig, QuantRule
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.text import refusal, require

BUDGET_FILE = "budget.json"
"""What was asked for, and what was chosen."""
_SET = "format", "block_size", "scale_rule", "scale_bits"
"""Fields that the choice sets."""
logger = logging.getLogger(__name__)


def choose_rules(
    source: str | Path,
    quant: QuantConfig,
    folder: Path,
    *,
    calibrate: CalibrationRows | None = None,
    adapter: AdapterConfig | None = None,
    limit: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> QuantConfig:
    """Replaces `quant.budget` by rules, and writes budget.json. Without a budget, does nothing. All
    processes; the first one writes.

    Args:
        source: local folder, GGUF file or hub id of the model.
        quant: quantization settings.
        folder: for the table of errors and budget.json.
        calibrate: rows of text, if `quant.allocation.errors` or the adapter needs them.
        adapter: its pairs, if they are fitted to the weights, correct some of the errors; None:
            there are none.
        limit: bytes of the whole base, for `quant.budget` fit.
        mesh: devices for the rows of text; None: one.
        progress: show a bar.

    Raises:
        ValueError: the budget is smaller than the smallest choice (the message states its size), a
            rule matches nothing, or as `make_errors`.
    """
    if quant.budget is None:
        return quant
    found, llama = together(lambda: open_weights(snapshot(source)))
    room = find_room(llama, quant, lambda path: FLOATS[found[_first(path)].dtype], limit)
    file = folder / ERRORS_FILE
    first_only(lambda: folder.mkdir(parents=True, exist_ok=True))
    fitted = adapter is not None and adapter.start.fit is not None and not adapter.start.trained
    options: dict[str, Any] = {"calibrate": calibrate, "mesh": mesh, "progress": progress}
    options |= {"adapter": adapter if fitted else None}
    errors = make_errors(source, quant, room.places, file, **options)
    groups = list(_groups(room.places, quant.allocation.tie))
    tied = np.stack([errors[own].sum(axis=0) for own in groups])
    bits = np.stack([room.bits[own].sum(axis=0) for own in groups])
    best = allocate(tied, bits, room.limit)
    choices = np.empty(len(room.places), int)
    for own, choice in zip(groups, best.choices, strict=True):
        choices[own] = choice
    chosen = _with_choices(llama, quant, room.places, choices)
    stored = best.bits + room.fixed
    logger.info(
        f"quant.budget = {quant.budget!r}: {stored / room.weights:.4f} bits a weight with "
        f"{len(chosen.rules)} rules"
    )
    about = {"asked": dataclasses.asdict(quant), "chosen": dataclasses.asdict(chosen)}
    about |= {"bits": stored / room.weights, "error": best.error}
    text = json.dumps(seal(about), indent=1) + "\n"
    first_only(lambda: write_text(folder / BUDGET_FILE, text))
    return chosen


def read_budget(folder: str | Path) -> tuple[QuantConfig, QuantConfig] | None:
    """Reads what was asked for and what was chosen; None without a budget.

    Raises:
        ValueError: budget.json is damaged.
    """
    file = Path(folder) / BUDGET_FILE
    if not file.is_file():
        return None
    try:
        values = check_seal(read_json(file), "chosen")
        asked, chosen = (QuantConfig.from_dict(values[name]) for name in ("asked", "chosen"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error})") from error
    return asked, chosen


@dataclasses.dataclass(frozen=True)
class Room:
    """What a budget leaves to choose. All sizes are in bits.

    Attributes:
        places: the matrices that no rule names.
        bits: their sizes with every candidate.
        limit: what they may take together.
        fixed: size of the matrices that a rule names.
        weights: number of weights of all linear layers.
    """

    places: list[Place]
    bits: Int[np.ndarray, "places candidates"]
    limit: int
    fixed: int
    weights: int


def find_room(
    llama: LlamaConfig,
    quant: QuantConfig,
    dtype: Callable[[Keys], DTypeLike],
    limit: int | None = None,
) -> Room:
    """Computes from shapes alone what a budget leaves to choose.

    Args:
        llama: the architecture.
        quant: with a budget.
        dtype: the type of a weight in the files, by its path.
        limit: bytes of the whole base, for `quant.budget` fit.

    Raises:
        ValueError: the budget is smaller than the smallest choice, which the message states; a
            rule matches nothing, or the rules leave nothing to choose.
    """
    assert quant.budget is not None
    given = dataclasses.replace(quant, budget=None)
    plan_stacks(llama, given)  # refuses a rule that matches nothing
    candidates, shapes = quant.candidates, llama.linear_shapes
    places, sizes, fixed = [], [], 0
    for layer, name in itertools.product(range(llama.num_hidden_layers), LINEAR_NAMES):
        path = linear_path(name)
        matrix = matrix_name(path, layer)
        kept = dtype(path)
        if _is_named(quant, matrix):
            fixed += matrix_bits(shapes[name], given.for_matrix(matrix), kept)
        else:
            places.append((layer, name))
            sizes.append([matrix_bits(shapes[name], one, kept) for one in candidates])
    accepted = "rules that leave a matrix to choose with quant.budget"
    require(bool(places), "quant.rules", [rule.match for rule in quant.rules], accepted)
    weights = llama.num_hidden_layers * sum(map(math.prod, shapes.values()))
    rest = _rest(llama, dtype)
    budget = parse_budget(quant.budget)
    amount = budget.amount
    if amount is None and limit is not None:
        amount = fractions.Fraction(limit)
    if amount is None:
        accepted = "a size here; only irqlora train knows what fits, and --plan says it"
        raise refusal("quant.budget", FIT, accepted)
    whole = math.floor(8 * amount) - rest if budget.whole else math.floor(amount * weights)
    bits = np.array(sizes, np.int64)
    least = fixed + int(bits.min(axis=1).sum())
    if whole < least:
        needed = f"{math.ceil((least + rest) / 8):,} bytes" if budget.whole else ""
        needed = needed or f"{_up(least / weights)} bits a weight"
        size = f" ({int(amount):,} bytes)" if budget.amount is None else ""
        accepted = f"at least {needed}, which the smallest candidates of quant.allocation need"
        raise refusal(f"quant.budget{size}", quant.budget, accepted)
    return Room(places, bits, whole - fixed, fixed, weights)


def planned_rules(
    source: str | Path, llama: LlamaConfig, quant: QuantConfig, limit: int | None = None
) -> QuantConfig:
    """Rules of about the size of the budget, without a table of errors.

    The last layers have the largest candidate that fits, the first ones the next larger, so that
    the budget is exceeded by less than a layer's difference.

    Args:
        source: folder, GGUF file or hub id of the model, whose config.json is read for the type of
            its weights.
        llama: the architecture.
        quant: with a budget, or without one: then it is returned.
        limit: as for `find_room`.

    Raises:
        ValueError: as `find_room`.
    """
    if quant.budget is None:
        return quant
    dtype = read_dtype(source)
    room = find_room(llama, quant, lambda _: dtype, limit)
    sums = room.bits.sum(axis=0)
    order = np.argsort(sums, kind="stable")
    low = int(np.searchsorted(sums[order], room.limit, side="right")) - 1
    smaller, larger = order[max(low, 0)], order[min(low + 1, len(order) - 1)]
    layers = np.array([layer for layer, _ in room.places])
    choices = np.full(len(layers), smaller)
    for count in range(llama.num_hidden_layers + 1):
        choices = np.where(layers < count, larger, smaller)
        if room.bits[np.arange(len(layers)), choices].sum() >= room.limit:
            break
    return _with_choices(llama, quant, room.places, choices)


def _is_named(quant: QuantConfig, matrix: str) -> bool:
    return any(fnmatch.fnmatchcase(matrix, rule.match) for rule in quant.rules)


def _first(path: Keys) -> str:
    """Name of a tensor of this path; all layers have the same type."""
    layered = path[0] in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    return weight_name(path, 0 if layered else None)


def _rest(llama: LlamaConfig, dtype: Callable[[Keys], DTypeLike]) -> int:
    """Bits of the embeddings, the head, the norms and the biases."""
    layered, single = weight_shapes(llama)
    each = [(path, shape, 1) for path, shape in single.items()]
    kept = [(p, s) for p, s in layered.items() if p[-1] not in LINEAR_NAMES]
    each += [(path, shape, llama.num_hidden_layers) for path, shape in kept]
    return sum(8 * n * math.prod(shape) * jnp.dtype(dtype(p)).itemsize for p, shape, n in each)


def _up(bits: float) -> str:
    """Rounds up, so that a budget of this number is enough."""
    return f"{math.ceil(bits * 1e4) / 1e4:.4f}"


def _groups(places: Sequence[Place], tie: int) -> Iterator[list[int]]:
    """Indices of the matrices that are stored alike."""
    found: dict[Place, list[int]] = {}
    for index, (layer, name) in enumerate(places):
        found.setdefault((layer // tie, name), []).append(index)
    yield from found.values()


def _with_choices(
    llama: LlamaConfig, quant: QuantConfig, places: Sequence[Place], choices: np.ndarray
) -> QuantConfig:
    """The configuration with rules: the most frequent choice is the default."""
    candidates = quant.candidates
    default, _ = collections.Counter(choices.tolist()).most_common(1)[0]
    table = np.full((llama.num_hidden_layers, len(LINEAR_NAMES)), ANY)
    for (layer, name), choice in zip(places, choices, strict=True):
        table[layer, LINEAR_NAMES.index(name)] = choice
    patterns = find_patterns(table, default)
    base = {name: getattr(candidates[default], name) for name in _SET}
    fixed = []
    for rule in quant.rules:  # they inherited other defaults
        own = dataclasses.replace(quant, budget=None, rules=(), **rule.overrides)
        fixed.append(rule if own.format == KEPT else _differing(rule, own, base))
    rules = (_differing(QuantRule(match), candidates[one], base) for match, one in patterns)
    plain = {"budget": None, "allocation": AllocationOptions(), "rules": (*fixed, *rules)}
    return dataclasses.replace(quant, **plain, **base)


def _differing(rule: QuantRule, own: QuantConfig, base: Mapping[str, Any]) -> QuantRule:
    """The rule with those fields that differ from the default. A rule that keeps other rules away
    from the default needs one field."""
    changes = {name: getattr(own, name) for name in base}
    changes = {name: value for name, value in changes.items() if value != base[name]}
    return dataclasses.replace(rule, **(changes or {"format": own.format}))
