"""Costs of the rows of the paper's tables before any is run: memory from shapes, GPU hours."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rows import METHODS, Asked, Row, Stage, Table, architecture, config_of, quant_of, stages
from rows import tables as read_tables

from irqlora_jax import hf
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.config import Config
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.plan.measure import find_plan_device, measure, prepare

FLOPS, SHARE = 312e12, 0.4  # an A100's bfloat16 peak (data sheet), and the share assumed reached
QUESTIONS, SUBJECTS, CONTEXT = 14_042, 57, 2048  # MMLU; prompts are cut to 2048 tokens
ANSWERS, ANSWER_TOKENS = 69_110, 256  # seven commonsense sets; the mean length is assumed

ASSUMPTIONS = f"""\
Hours are GPU hours of an A100. They are computed, not measured.
  paper    table 7 of the paper (one A100, 10,000 steps, batch 16), scaled by steps and batch, and
           by weights if the model is a stand-in.
  derived  an upper bound at {SHARE:.0%} of {FLOPS / 1e12:.0f} TFLOP/s: every row has the maximal
           length. For each token, a step takes 6 FLOP for a frozen weight (forward, recomputation,
           gradient of the activations) and 8 for a trained one. An evaluation takes 2. MMLU has
           {QUESTIONS:,} prompts of {CONTEXT:,} tokens, commonsense {ANSWERS:,} answers of
           {ANSWER_TOKENS}.
  GiB      stored on the device, exactly: base, adapters, moments of the optimizer. --plan GPU
           compiles the step and adds a column with the peak."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """GPU hours and GiB of one row or more."""

    paper: float
    derived: float
    evaluation: float
    stored: float
    peak: float | None


def shapes(model: str | None, size: str) -> LlamaConfig:
    """The architecture of a model or, without a model, of a published size."""
    if model is None:
        return architecture(size)
    return hf.read_config(Path(model) if Path(model).is_dir() else model)


def cost(row: Row, table: Table, asked: Asked, llama: LlamaConfig, device: str | None) -> Cost:
    """The cost of a row from the start, as if it shared nothing with other rows.

    Args:
        row: the row; its method must be available.
        table: the row's table.
        asked: options that all rows share.
        llama: the architecture.
        device: compile the training step for this one (of `irqlora_jax.plan.gpus`), for the peak.
    """
    config, peak = config_of(row, table, asked), None
    stored, size = storage(row, llama), adapter_size(row, config, llama)
    if config is None:
        paper = derived = 0.0
    else:
        stored += 3 * size * (4 if config.adapter.dtype == "float32" else 2)
        paper = _paper_hours(row, config, llama)
        train, data = config.train, config.data
        tokens = train.total_steps * train.batch_size * (data.source_length + data.target_length)
        derived = _hours(tokens * (6 * weights(llama) + 8 * size))
        if device is not None:
            mesh = dataclasses.replace(config.mesh, data=1)
            config = dataclasses.replace(config, mesh=mesh)
            prepare(config)
            base = abstract_base(llama, config.quant)
            peak = measure(config, base, llama, find_plan_device(device, 1)).peak / 2**30
    tokens = {8: _commonsense(asked)}.get(table.number, _mmlu(asked) * ("STEM" in table.columns))
    evaluation = _hours(2 * (weights(llama) + size) * tokens)
    return Cost(paper, derived, evaluation, stored / 2**30, peak)


def total(rows: Sequence[Row], costs: Mapping[Row, Cost], table: Table, asked: Asked) -> Cost:
    """Hours of all rows. Stages that rows share count once, and finished stages do not count."""
    left: dict[Stage, tuple[float, float, float]] = {}
    for row in rows:
        for stage in stages(row, table, asked):
            own = costs[row]
            kind = {"train": (own.paper, own.derived, 0.0), "eval": (0.0, 0.0, own.evaluation)}
            if not stage.done.is_file():
                left[stage] = kind.get(stage.argv[0], (0.0, 0.0, 0.0))
    paper, derived, evaluation = (sum(each) for each in zip((0, 0, 0), *left.values(), strict=True))
    peaks = [own.peak for own in costs.values() if own.peak is not None]
    stored = max((own.stored for own in costs.values()), default=0.0)
    return Cost(paper, derived, evaluation, stored, max(peaks, default=None))


def storage(row: Row, llama: LlamaConfig) -> int:
    """Bytes of a base with 16-bit embeddings."""
    return measure_base(abstract_base(llama, quant_of(row))).total


def weights(llama: LlamaConfig) -> int:
    """Number of weights in products with a token: linear layers and output matrix."""
    layer = sum(out * into for out, into in llama.linear_shapes.values())
    return llama.num_hidden_layers * layer + llama.vocab_size * llama.hidden_size


def adapter_size(row: Row, config: Config | None, llama: LlamaConfig) -> int:
    """Number of trained parameters, with IEC's scalars."""
    if config is None:
        return 0
    adapter, chosen = config.adapter, config.adapter.targets
    targets = [shape for name, shape in llama.linear_shapes.items() if name in chosen]
    pairs = sum(adapter.rank * (out + into) for out, into in targets)
    scalars = 2 * len(targets) * (METHODS[row.method].adapter or {}).get("method", "").count("iec")
    return llama.num_hidden_layers * (pairs + scalars)


def _paper_hours(row: Row, config: Config, llama: LlamaConfig) -> float:
    size = row.size.removeprefix("llama2-")
    method = "IR-QLoRA" if config.quant.calibration == "icq" else "Vanilla"
    printed = [r for r in read_tables()[7].rows if (r.size, r.method) == (size, method)]
    share = weights(llama) / weights(architecture(size))
    work = config.train.total_steps * config.train.batch_size / (10_000 * 16)
    return printed[0].figures[0] * share * work


def _mmlu(asked: Asked) -> int:
    most = QUESTIONS if asked.max_questions is None else SUBJECTS * asked.max_questions
    return min(most, QUESTIONS) * CONTEXT


def _commonsense(asked: Asked) -> int:
    # A question has at most four answers.
    most = ANSWERS if asked.max_questions is None else 4 * len(asked.tasks) * asked.max_questions
    return min(most, ANSWERS) * ANSWER_TOKENS


def _hours(flops: float) -> float:
    return flops / (SHARE * FLOPS) / 3600
