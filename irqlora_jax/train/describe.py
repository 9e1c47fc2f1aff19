"""What a run says about itself at its start and at its end."""

import jax

from irqlora_jax.base.file import Base
from irqlora_jax.base.storage import measure_base
from irqlora_jax.config import Config
from irqlora_jax.sharding import bytes_by_device
from irqlora_jax.text import readable_size
from irqlora_jax.train.job import Job


def describe(job: Job, base: Base) -> str:
    """Describes the run in two lines, and with several devices in a third one."""
    config, llama, mesh, examples = job.config, job.model.config, job.mesh, len(job.examples)
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
    quantized = config.quant.label if config.quant.quantizes else "unquantized"
    epochs = "" if job.epochs is None else f" ({job.epochs:g} epochs of {job.batches.rows:,} rows)"
    what = "pairs" if job.preference else "examples"
    start = f" from {adapter.source or adapter.start.title}" if adapter.start_title else ""
    return (
        f"{config.model}: {llama.num_hidden_layers} layers of {llama.hidden_size}, {quantized}, "
        f"{stored.bits:.2f} bits a weight, {readable_size(stored.total)} with embeddings\n"
        f"{adapter.method} of rank {adapter.rank}{start}, {examples:,} {what}, "
        f"{train.total_steps:,} steps of {train.batch_size}{epochs} on "
        f"{jax.devices()[0].device_kind}{devices}"
    )


def next_commands(config: Config) -> str:
    """Lists commands to try with a finished run."""
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
