"""The configuration: frozen dataclasses, read from YAML and dotted overrides.

An unknown key or invalid value is an error that names the field, the value and the accepted values.
The fields are documented only here; `python train.py --help` prints the documentation.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from irqlora_jax.adapters import config as adapter
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.data.config import DataConfig
from irqlora_jax.quant import config as quant
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import MeshConfig
from irqlora_jax.text import read_text, require, with_current_names

Parsed = TypeVar("Parsed")
_RENAMED = {"quant": quant.RENAMED, "adapter": adapter.RENAMED}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimization. The defaults are from the paper for LLaMA 7B and 13B (appendix B.4)."""

    steps: int = 10_000
    """Number of optimizer steps."""
    batch_size: int = 16
    """Examples per optimizer step."""
    accumulation: int = 1
    """Gradient accumulation: split a batch into this many forward and backward passes."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule after the warmup; linear and cosine end at 0 at the last step."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises linearly from 0."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.999
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: constant added to the square root of the second moment."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay."""
    clip_norm: float | None = 0.3
    """Clip gradients to this global norm (null: no clipping)."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the activations. float16 uses loss scaling. Null: the fastest type of the device,
    which is bfloat16, float16 on GPUs before compute capability 8.0 (e.g. T4), or float32 on CPUs.
    A resumed run keeps its type."""
    attention: Literal["xla", "cudnn"] | None = None
    """Implementation of attention. Null: cuDNN's flash attention if possible (NVIDIA GPU of compute
    capability 8.0 or more, half precision, no packing), else XLA in chunks of queries."""
    matmul: Literal["xla", "mosaic", "triton"] | None = None
    """Implementation of products with packed weights: XLA, or a kernel for GPUs
    (kernels/README.md). Null: a kernel if measurements showed that it is faster, else XLA."""
    remat: bool = True
    """Recompute the activations of a layer in the backward pass instead of keeping them."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in pinned memory of the host (QLoRA's paged optimizer). This
    needs less memory on the device and gives the same result, but every step waits for the
    transfer."""
    loss_chunk: int = 1024
    """Compute the loss in chunks of this many positions, to save memory for logits."""
    eval_every: int = 0
    """Steps between evaluation losses (0: only at the end)."""
    save_every: int = 0
    """Steps between checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep. The checkpoint with the best evaluation loss, and with
    LoftQ the checkpoint of step 0, are also kept."""
    early_stopping: int = 0
    """Stop after this many consecutive evaluations without a better loss (0: never)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "loss_chunk", "keep_checkpoints"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}", value, "a whole number of at least 1")
        for name in ("warmup_steps", "eval_every", "save_every", "weight_decay", "early_stopping"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.{name}", value, "a finite number of 0 or more")
        ok = self.early_stopping == 0 or self.eval_every > 0
        require(ok, "train.early_stopping", self.early_stopping, "0 with train.eval_every 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "0 <= value < 1")
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"train.{name}", value, "a positive finite number")
        clip = self.clip_norm
        require(clip is None or clip > 0, "train.clip_norm", clip, "a positive number, or null")
        ok = self.batch_size % self.accumulation == 0
        accepted = f"a divisor of train.batch_size = {self.batch_size}"
        require(ok, "train.accumulation", self.accumulation, accepted)

    @property
    def rows(self) -> int:
        """Rows of a forward pass."""
        return self.batch_size // self.accumulation


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measurements in addition to the evaluation loss."""

    questions: str | None = None
    """File with multiple-choice questions for the end of the run (.jsonl: subject, prompt, choices,
    answer)."""
    max_questions: int | None = None
    """Use only this many questions (null: all)."""
    baselines: bool = False
    """Also measure the full-precision model and the quantized model without finetuning. Besides
    the run's calibration, the table shows the plain quantizer and, with joint, ICQ."""
    samples: tuple[str, ...] = ()
    """Prompts to answer at every evaluation (with data.format alpaca: instructions)."""
    sample_tokens: int = 64
    """Maximum length of an answer to a sample, in tokens."""

    def __post_init__(self) -> None:
        limit = self.max_questions
        ok = limit is None or limit >= 1
        require(ok, "evaluate.max_questions", limit, "a whole number of at least 1, or null")
        size = self.sample_tokens
        require(size >= 1, "evaluate.sample_tokens", size, "a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Logging during the training."""

    every: int = 10
    """Number of steps between lines of metrics.jsonl."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard to the folder of the run (needs the extra tb)."""
    wandb: str | None = None
    """Also send the metrics to this Weights & Biases project (needs the extra wandb)."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "log.every", self.every, "a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """The complete configuration of a run."""

    model: str
    """Folder with a Hugging Face LLaMA (safetensors), its id on the hub, or a folder written by
    irqlora quantize."""
    output_dir: str
    """Folder of the run, for the quantized base, checkpoints, metrics and scores."""
    seed: int = 0
    """Random seed of the adapters, the order of the data, and the dropout."""
    quant: QuantConfig = QuantConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        # A fitted initialization corrects the quantization error.
        ok = self.quant.quantizes or self.adapter.start.fit is None
        require(ok, "adapter.init", self.adapter.init, "default with quant.format none")

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "Config":
        """Reads a YAML file. `overrides` maps dotted names to values, as on the command line.

        Raises:
            ValueError: no such file, unknown key, wrong type or invalid value.

        Examples:
            >>> config = Config.load("configs/quickstart.yaml", {"quant.format": "nf4"})
            >>> config.quant.format, config.quant.calibration, config.adapter.method
            ('nf4', 'joint', 'iec')
        """
        argv = [f"--config={path}"]
        for name, value in (overrides or {}).items():
            written = value if isinstance(value, str) else json.dumps(value)
            argv.append(f"--{name}={'.inf' if value == math.inf else written}")
        return parse_config(argv)


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Quantizes a base once for several runs. Use its folder as their `model`."""

    model: str
    """Folder with a Hugging Face LLaMA (safetensors), or its id on the hub."""
    output_dir: str
    """New folder for the quantized base and its tokenizer."""
    quant: QuantConfig = QuantConfig()
    progress: bool = True
    """Show a progress bar."""


@dataclasses.dataclass(frozen=True)
class TrainOptions(Config):
    __doc__ = Config.__doc__

    plan: bool | str = False
    """Only check whether the run fits into memory, and if not, what would fit: `--plan` for this
    device, `--plan NAME` for another (t4, 4090, l4, a6000, a100-40, a100-80, h100, h200, ...). The
    training step is compiled from shapes: no weights are read, and nothing is written."""
    resume_from: int | None = None
    """Go on from the checkpoint of this step, not from the newest one. Checkpoints and metrics of
    later steps are deleted."""

    def config(self) -> Config:
        """The configuration of the run."""
        names = (field.name for field in dataclasses.fields(Config))
        return Config(**{name: getattr(self, name) for name in names})


def parse_config(argv: Sequence[str]) -> Config:
    """Parses a command line: `--config FILE` and `--section.key value` overrides.

    Raises:
        ValueError: no such file, unknown key, wrong type or invalid value.
    """
    return parse_flags(Config, argv, "train.py")


def parse_flags(kind: type[Parsed], argv: Sequence[str], script: str) -> Parsed:
    """Makes a dataclass from flags and, with `--config`, a YAML file that the flags override.

    The value of a boolean flag is optional: `--baseline` means `--baseline=true`.

    Raises:
        ValueError: no such file, unknown key, wrong type or invalid value.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=script,
        usage=f"{script} [--config FILE] [--field VALUE | --section.field VALUE ...]",
        exit_on_error=False,
        description=kind.__doc__,
    )
    parser.add_argument(
        "--config", action="config", help="YAML or JSON file. Flags that follow override it."
    )
    parser.add_class_arguments(kind, as_group=False)
    switches = set(_switches(kind))
    values = [
        f"{flag}=true" if flag in switches and (after is None or after[:2] == "--") else flag
        for flag, after in itertools.zip_longest(argv, argv[1:])
    ]
    try:
        fields = vars(parser.instantiate(parser.parse_args(_with_current_flags(kind, values))))
    except jsonargparse.ArgumentError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{text} ({script} --help lists every field)") from error
    fields.pop("config")
    return kind(**fields)


def _with_current_flags(kind: type, argv: Sequence[str]) -> list[str]:
    """Replaces old names of fields in flags and configuration files."""
    renamed = {
        f"{section}.{old}": ".".join((section, *new))
        for section, names in _RENAMED.items()
        for old, new in names.items()
    }
    current: list[str] = []
    for flag in argv:
        name, equals, value = flag.removeprefix("--").partition("=")
        if current and current[-1] == "--config":
            current.append(_read_config(kind, flag))
        elif flag.startswith("--config="):
            current.append(f"--config={_read_config(kind, value)}")
        elif flag.startswith("--") and name in renamed:
            current.append(f"--{renamed[name]}{equals}{value}")
        else:
            current.append(flag)
    return current


def _read_config(kind: type, path: str) -> str:
    """Returns a configuration file as YAML text with the current names of fields.

    Leaves empty sections out. Returns the path if nothing changes or no mapping can be read. The
    parser then reads the file.

    Raises:
        ValueError: a section has no fields, or a key appears twice (the parser would keep only the
            last one).
    """
    import yaml
    from jsonargparse import get_loader

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(_repeated([name for name, _ in pairs]))
        return dict(pairs)

    repeated: list[str] = []
    try:
        text = read_text(Path(path))
        # JSON and YAML write non-finite numbers differently.
        if path.endswith(".json"):
            values = json.loads(text, object_pairs_hook=unique)
        else:
            values = get_loader("yaml")(text)
            repeated.extend(_repeated_keys(yaml.compose(text)))
    except (OSError, ValueError, yaml.YAMLError):
        return path
    if repeated:
        raise ValueError(f"{path}: {repeated[0]} appears twice: expected every key once")
    if not isinstance(values, dict):
        return path
    current = _without_empty(kind, values, path)
    for section, names in _RENAMED.items():
        if isinstance(current.get(section), dict):
            current[section] = with_current_names(current[section], names)
    if current == values and not path.endswith(".json"):
        return path
    return yaml.safe_dump(current, sort_keys=False)


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for place, name in enumerate(names) if name in names[:place]]


def _repeated_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of keys that appear twice in a mapping of a YAML node."""
    if node is None or isinstance(node.value, str):
        return
    if node.id == "sequence":
        for child in node.value:
            yield from _repeated_keys(child, prefix)
        return
    names = [f"{prefix}{key.value}" for key, _ in node.value]
    yield from _repeated(names)
    for name, (_, child) in zip(names, node.value, strict=True):
        yield from _repeated_keys(child, f"{name}.")


def _without_empty(
    kind: type, values: Mapping[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Leaves out sections without a value (`train:`), so that they have their defaults.

    Raises:
        ValueError: a section has no fields but another value.
    """
    current = dict(values)
    for field in dataclasses.fields(kind):
        value = current.get(field.name)
        if not dataclasses.is_dataclass(field.type) or field.name not in current:
            continue
        if value is None:
            del current[field.name]
            continue
        name = f"{prefix}{field.name}"
        require(isinstance(value, dict), f"{path}: {name}", value, "a section with fields")
        inner: Any = field.type
        current[field.name] = _without_empty(inner, value, path, f"{name}.")
    return current


def _switches(kind: type, prefix: str = "--") -> Iterator[str]:
    """Yields the flags that accept a boolean."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _switches(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.type in (bool, bool | str):
            yield prefix + field.name
