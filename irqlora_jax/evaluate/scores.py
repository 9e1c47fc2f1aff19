"""What a person sees: the first lines of a run, and the table at its end."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from irqlora_jax.base.file import Base
from irqlora_jax.base.make import load_base
from irqlora_jax.base.storage import measure_base
from irqlora_jax.config import Config
from irqlora_jax.data import Example
from irqlora_jax.evaluate import Question, evaluation_loss, score_questions
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.quant.calibrations.icq import ICQ
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.text import aligned


@dataclasses.dataclass(frozen=True)
class Row:
    """Scores of one model. None: not measured.

    Attributes:
        model: what it is.
        entropy: mean entropy of the blocks' codes, in bits.
        loss: evaluation loss in nats per target token.
        accuracy: share of multiple-choice questions answered right.
        bits: stored bits per weight of the linear layers, scales and shifts included.
        seconds: that reading, quantizing or finetuning took.
    """

    model: str
    entropy: float | None
    loss: float | None
    accuracy: float | None
    bits: float
    seconds: float | None


def mean_entropy(base: Base) -> float | None:
    """Mean entropy of all blocks in bits; None if the base is not quantized."""
    entropies = [w.entropy() for _, w in linear_stacks(base) if isinstance(w, QTensor)]
    if not entropies:
        return None
    return sum(float(e.sum()) for e in entropies) / sum(e.size for e in entropies)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Measures models in one way.

    Attributes:
        examples: for the evaluation loss; may be none.
        questions: for the accuracy; may be none.
        batch_size: rows computed at one time.
        chunk: positions whose logits exist at one time.
    """

    examples: list[Example]
    questions: list[Question]
    batch_size: int
    chunk: int

    def row(
        self,
        name: str,
        model: Llama,
        variables: dict[str, Any],
        seconds: float | None,
        loss: float | None = None,
    ) -> Row:
        """Scores a model; `loss` is its evaluation loss if that is known already."""
        if loss is None and self.examples:
            loss = evaluation_loss(model, variables, self.examples, self.batch_size, self.chunk)
        accuracy = None
        if self.questions:
            size = max(self.batch_size, 64)
            accuracy = score_questions(model, variables, self.questions, size).accuracy
        base = variables["base"]
        return Row(name, mean_entropy(base), loss, accuracy, measure_base(base).bits, seconds)


def baselines(
    config: Config,
    model: Llama,
    base: Base,
    mesh: Mesh,
    scorer: Scorer,
    quantize_seconds: float | None,
    start: dict[str, Any] | None = None,
) -> list[Row]:
    """Scores the model before its finetune: in full precision, and quantized.

    The plain quantizer and, if the run has a calibration of its own, ICQ (the paper's) come before
    the quantizer of the run. With LoftQ the last row is the base with its initial adapter, and the
    quantizer alone comes before it.

    Args:
        config: of the run.
        model: with its adapter.
        base: of the run.
        mesh: that it lies on.
        scorer: how to measure.
        quantize_seconds: that reading and quantizing took, if it was done.
        start: the adapters that the training started from, with LoftQ.
    """
    quant, bare = config.quant, model.clone(adapter=None)
    quantized = quant.quantizes
    others: list[tuple[str, QuantConfig | None]] = [("full precision", None)]
    if quantized and quant != quant.plain:
        others.append((quant.plain.label, quant.plain))
        if quant.calibration != ICQ.name:
            paper = dataclasses.replace(quant, calibration=ICQ.name)
            others.append((paper.label, paper))
    if start is not None:
        others.append((quant.label, quant))
    rows = []
    for name, how in others:
        started = time.perf_counter()
        other, _ = load_base(config.model, how, mesh=mesh)
        jax.block_until_ready(other)
        seconds = time.perf_counter() - started
        rows.append(scorer.row(name, bare, {"params": {}, "base": other}, seconds))
        del other
    if start is not None:
        variables = {"params": start, "base": base}
        rows.append(
            scorer.row(
                f"{quant.label} + {config.adapter.start.title}", model, variables, quantize_seconds
            )
        )
    elif quantized:
        rows.append(scorer.row(quant.label, bare, {"params": {}, "base": base}, quantize_seconds))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = ("model", "entropy", "loss", "accuracy", "bits a weight", "seconds")
    forms = ("{}", "{:.3f}", "{:.4f}", "{:.1%}", "{:.2f}", "{:.1f}")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        values = dataclasses.astuple(row)
        cells.append(
            tuple("-" if v is None else f.format(v) for f, v in zip(forms, values, strict=True))
        )
    return aligned(cells)
