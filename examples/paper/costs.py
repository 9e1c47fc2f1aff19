"""What the rows of the paper's tables cost, before any is run: memory from shapes, GPU hours."""

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

FLOPS, SHARE = 312e12, 0.4  # an A100's bfloat16 peak (data sheet), and what is taken to be reached
QUESTIONS, SUBJECTS, CONTEXT = 14_042, 57, 2048  # of MMLU; prompts are cut to 2048 tokens
ANSWERS, ANSWER_TOKENS = 69_110, 256  # of the seven commonsense sets; an assumed mean length

ASSUMPTIONS = f"""\
Hours are GPU hours of an A100, by arithmetic; none of them is measured here.
  paper    the paper's table 7 (one A100, 10,000 steps, batch 16), in proportion to steps and batch,
           and for a stand-in to weights.
  derived  at most, at {SHARE:.0%} of {FLOPS / 1e12:.0f} TFLOP/s: every row is as long as it may be.
           A step takes 6 FLOP a frozen weight and token (forward, recomputation, gradient of the
           activations) and 8 a trained one; an evaluation takes 2, for MMLU of {QUESTIONS:,}
           prompts of {CONTEXT:,} tokens, for commonsense of {ANSWERS:,} answers of {ANSWER_TOKENS}.
  GiB      stored on the device: base, adapters, moments of the optimizer; exact. What a step needs
           besides is compiled with --plan GPU: the column of the peak."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """GPU hours, and GiB."""

    paper: float
    derived: float
    evaluation: float
    stored: float
    peak: float | None


def shapes(model: str | None, size: str) -> LlamaConfig:
    """The architecture of a model, or of a published size where there is none."""
    if model is None:
        return architecture(size)
    return hf.read_config(Path(model) if Path(model).is_dir() else model)


def cost(row: Row, table: Table, asked: Asked, llama: LlamaConfig, device: str | None) -> Cost:
    """Of a row that shares nothing with others, from the start.

    Args:
        row: which; its method must be available.
        table: that it stands in.
        asked: how it is made.
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
        tokens = train.steps * train.batch_size * (data.source_length + data.target_length)
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
    """Hours of all rows, of which those that are the same count once and those done not at all."""
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
    """Bytes of a base, embeddings in 16 bits."""
    return measure_base(abstract_base(llama, quant_of(row))).total


def weights(llama: LlamaConfig) -> int:
    """Weights that a token is multiplied by: the linear layers and the output matrix."""
    layer = sum(out * into for out, into in llama.linear_shapes.values())
    return llama.num_hidden_layers * layer + llama.vocab_size * llama.hidden_size


def adapter_size(row: Row, config: Config | None, llama: LlamaConfig) -> int:
    """Trained numbers, IEC's scalars included."""
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
    work = config.train.steps * config.train.batch_size / (10_000 * 16)
    return printed[0].figures[0] * share * work


def _mmlu(asked: Asked) -> int:
    most = QUESTIONS if asked.max_questions is None else SUBJECTS * asked.max_questions
    return min(most, QUESTIONS) * CONTEXT


def _commonsense(asked: Asked) -> int:
    # Four answers to a question at most.
    most = ANSWERS if asked.max_questions is None else 4 * len(asked.tasks) * asked.max_questions
    return min(most, ANSWERS) * ANSWER_TOKENS


def _hours(flops: float) -> float:
    return flops / (SHARE * FLOPS) / 3600
