"""What a person sees: the first lines of a run, and the table at its end."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from irqlora_jax import hf
from irqlora_jax.checkpoint import Base
from irqlora_jax.config import Config, QuantConfig
from irqlora_jax.data import Example
from irqlora_jax.evaluate import Question, evaluation_loss, score_questions
from irqlora_jax.llama import Llama, LlamaConfig
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.sharding import bytes_by_device
from irqlora_jax.storage import linears, measure_base


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
    entropies = [w.entropy() for w in linears(base) if isinstance(w, QTensor)]
    if not entropies:
        return None
    return sum(float(e.sum()) for e in entropies) / sum(e.size for e in entropies)


def peak_memory() -> int:
    """Largest number of bytes in use so far: on the accelerator, or by the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def readable_size(size: int) -> str:
    """A number of bytes as people say it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def describe(config: Config, llama: LlamaConfig, base: Base, examples: int, mesh: Mesh) -> str:
    """What is about to happen, in two lines, and with several devices a third one."""
    adapter, train = config.adapter, config.train
    stored = measure_base(base)
    devices = ""
    if mesh.size > 1 or len(jax.devices()) > 1:
        axes = ", ".join(f"{name} {count}" for name, count in mesh.shape.items())
        largest = max(bytes_by_device(base).values())
        devices = (
            f"\n{mesh.size} of {len(jax.devices())} devices ({axes}), "
            f"{readable_size(largest)} of the base on each"
        )
    quantized = "unquantized" if config.quant.format == "none" else config.quant.label
    start = " from LoftQ" if adapter.init == "loftq" else ""
    return (
        f"{config.model}: {llama.num_hidden_layers} layers of {llama.hidden_size}, {quantized}, "
        f"{stored.bits:.2f} bits a weight, {readable_size(stored.total)} with embeddings\n"
        f"{adapter.method} of rank {adapter.rank}{start}, {examples:,} examples, {train.steps:,} "
        f"steps of {train.batch_size} on {jax.devices()[0].device_kind}{devices}"
    )


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
    """Scores what a run came from: the full-precision model and its quantized forms.

    With LoftQ the last of them is base and pair together, and the quantizer alone, which has
    another base, comes before.

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
    quantized = quant.format != "none"
    others: list[tuple[str, QuantConfig | None]] = [("full precision", None)]
    if quantized and quant.calibration != "none":
        plain = dataclasses.replace(quant, calibration="none")
        others.append((plain.label, plain))
    if start is not None:
        others.append((quant.label, quant))
    rows = []
    for name, how in others:
        started = time.perf_counter()
        other, _ = hf.load_base(config.model, how, mesh=mesh)
        jax.block_until_ready(other)
        seconds = time.perf_counter() - started
        rows.append(scorer.row(name, bare, {"params": {}, "base": other}, seconds))
        del other
    if start is not None:
        variables = {"params": start, "base": base}
        rows.append(scorer.row(f"{quant.label} + LoftQ", model, variables, quantize_seconds))
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


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; the first row is the head, the first column names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def next_commands(config: Config) -> str:
    """What to try with a finished run."""
    run = f"--run {config.output_dir}"
    commands = [
        f"eval {run} --task perplexity --text FILE",
        f"chat {run}",
        f"export {run} --output_dir NEW_FOLDER",
    ]
    if config.evaluate.questions is not None:
        commands.insert(0, f"eval {run} --task questions --baseline")
    lines = [f"\nsaved in {config.output_dir}; next:"]
    return "\n".join(lines + [f"  irqlora {command}" for command in commands])
