"""Scores a run and its baselines for the table at the end of the run."""

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
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.evaluate import Question, evaluation_loss, score_questions
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.quant.calibrations.icq import ICQ
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.formats import FORMATS
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.text import aligned


@dataclasses.dataclass(frozen=True)
class Row:
    """Scores of one model. None: not measured.

    Attributes:
        model: name of the model.
        entropy: mean entropy of the codes of a block, in bits.
        loss: evaluation loss in nats per target token.
        accuracy: fraction of multiple-choice questions answered right.
        bits: stored bits per weight of the linear layers, including scales and shifts.
        seconds: time for reading, quantizing or finetuning.
        training_loss: of the last batch, in nats per target token; only of the finetuned model.
    """

    model: str
    entropy: float | None
    loss: float | None
    accuracy: float | None
    bits: float
    seconds: float | None
    training_loss: float | None = None


def mean_entropy(base: Base) -> float | None:
    """Mean entropy of all blocks in bits; None if the base is not quantized."""
    entropies = [w.entropy() for _, w in linear_stacks(base) if isinstance(w, QTensor)]
    if not entropies:
        return None
    return sum(float(e.sum()) for e in entropies) / sum(e.size for e in entropies)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores several models with the same data and settings.

    Attributes:
        examples: for the evaluation loss; may be empty.
        questions: for the accuracy; may be empty.
        rows: rows of a forward pass of the training.
        length: longest row of the training, in tokens. No forward pass sees more than rows * length
            tokens, unless one question does.
        chunk: positions whose logits are in memory at the same time.
        progress: say when it takes long.
    """

    examples: list[Example]
    questions: list[Question]
    rows: int
    length: int
    chunk: int
    progress: bool = True

    def row(
        self,
        name: str,
        model: Llama,
        variables: dict[str, Any],
        seconds: float | None,
        loss: float | None = None,
    ) -> Row:
        """Scores a model. `loss` is its evaluation loss if it is already known."""
        with progress_bar(f"Scoring {name}", show=self.progress):
            if loss is None and self.examples:
                loss = evaluation_loss(model, variables, self.examples, self.rows, self.chunk)
            return self._row(name, model, variables, seconds, loss)

    def _row(
        self,
        name: str,
        model: Llama,
        variables: dict[str, Any],
        seconds: float | None,
        loss: float | None,
    ) -> Row:
        accuracy = None
        if self.questions:
            longest = max(len(q.prompt) + max(map(len, q.choices)) for q in self.questions)
            size = min(max(self.rows, 64), max(1, self.rows * self.length // longest))
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
    calibrate: CalibrationRows | None = None,
) -> list[Row]:
    """Scores the model before its finetune: in full precision, and quantized.

    The plain quantizer and, if the run has a calibration of its own, ICQ (the paper's) come before
    the quantizer of the run. With LoftQ the last row is the base with its initial adapter, and the
    quantizer alone comes before it.

    Args:
        config: of the run.
        model: with its adapter.
        base: of the run.
        mesh: the mesh of the base.
        scorer: data and settings of the scores.
        quantize_seconds: time for reading and quantizing, if that was done.
        start: the initial adapters of the training if they are not new (LoftQ, `init_from`).
        calibrate: the text of the calibration, needed for the quantizer alone.
    """
    quant, bare = config.quant, model.clone(adapter=None)
    quantized = quant.quantizes
    others: list[tuple[str, QuantConfig | None]] = [("full precision", None)]
    if quantized and quant != quant.plain:
        others.append((quant.plain.label, quant.plain))
        if quant.calibration != ICQ.name:
            paper = _paper(quant)
            if not paper.needs_inputs:  # by a rule
                others.append((paper.label, paper))
    if start is not None:
        others.append((quant.label, quant))
    rows = []
    for name, how in others:
        started = time.perf_counter()
        with progress_bar(f"Loading {name}", show=config.log.progress):
            text = calibrate if how is not None and how.needs_text else None
            other, _ = load_base(config.model, how, mesh=mesh, calibrate=text)
            jax.block_until_ready(other)
        seconds = time.perf_counter() - started
        rows.append(scorer.row(name, bare, {"params": {}, "base": other}, seconds))
        del other
    if start is not None:
        variables = {"params": start, "base": base}
        rows.append(
            scorer.row(
                f"{quant.label} + {config.adapter.start_title}", model, variables, quantize_seconds
            )
        )
    elif quantized:
        rows.append(scorer.row(quant.label, bare, {"params": {}, "base": base}, quantize_seconds))
    return rows


def _paper(quant: QuantConfig) -> QuantConfig:
    """The same storage with ICQ. Formats that are no integers get shifts, which it searches."""
    rules, symmetric = quant.rules, quant.symmetric
    formats = (quant.format, *(rule.format for rule in rules))
    if not all(FORMATS[name].integer for name in formats if name in FORMATS):
        rules = tuple(
            dataclasses.replace(rule, symmetric=rule.symmetric and False) for rule in rules
        )
        symmetric = False
    return dataclasses.replace(quant.plain, calibration=ICQ.name, symmetric=symmetric, rules=rules)


def table(rows: Sequence[Row]) -> str:
    """Formats the rows as an aligned table."""
    head = ["model", "entropy", "loss", "accuracy", "bits a weight", "seconds"]
    forms = ("{}", "{:.3f}", "{:.4f}", "{:.1%}", "{:.2f}", "{:.1f}")
    trained = all(row.loss is None for row in rows)  # there are no data for an evaluation
    if trained:
        head[2] = "training loss"
    cells: list[Sequence[str]] = [head]
    for row in rows:
        loss = row.training_loss if trained else row.loss
        values = (row.model, row.entropy, loss, row.accuracy, row.bits, row.seconds)
        cells.append(
            tuple("-" if v is None else f.format(v) for f, v in zip(forms, values, strict=True))
        )
    return aligned(cells)
