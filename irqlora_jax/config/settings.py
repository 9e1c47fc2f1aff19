"""Settings of a finetuning run and of quantization.

The fields are documented only here; `python train.py --help` prints the documentation.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.lora import LORA
from irqlora_jax.base.budget import read_budget
from irqlora_jax.base.file import read_base_config
from irqlora_jax.config.adapter import fill_from_adapter, is_run
from irqlora_jax.config.base import fill_from_base, find_base, quant_settings
from irqlora_jax.config.parse import Convert, parse, parse_flags
from irqlora_jax.data.calibrate import CalibrateConfig
from irqlora_jax.data.config import DataConfig
from irqlora_jax.files.hub import adapter_folder
from irqlora_jax.model.dpo import DpoOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import MeshConfig
from irqlora_jax.text import require, shorten

_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class RateRule:
    """Learning rate and weight decay of some leaves of the adapter."""

    example: ClassVar[str] = "[{match: PATTERN, factor: 0.5}]"

    match: str
    """Shell pattern for the names of the leaves (*, ?, [0-3]). A name is
    layers.LAYER.self_attn.PROJECTION.LEAF or layers.LAYER.mlp.PROJECTION.LEAF, with layers counted
    from 0. "*.lora_B" is one matrix of all pairs, "layers.0.*" the first layer."""
    factor: float | None = None
    """They learn with this many times train.learning_rate; 0 freezes them. Null: as without the
    rule (1, or train.lora_plus_ratio)."""
    weight_decay: float | None = None
    """Null: train.weight_decay."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimization. The defaults are from the paper for LLaMA 7B and 13B (appendix B.4)."""

    steps: int | None = None
    """Number of optimizer steps. Null: as many as `epochs` need, or 10,000 without them."""
    epochs: float | None = None
    """How many times the training uses every row of the data, instead of `steps`; also a fraction.
    With data.packing, packed rows count; with weights in data.train, an epoch has as many rows as
    all sources together."""
    batch_size: int = 16
    """Examples per optimizer step."""
    accumulation: int = 1
    """Gradient accumulation: split a batch into this many forward and backward passes."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lora_plus_ratio: float = 1.0
    """LoRA+: the matrix lora_B learns with this many times the learning rate, unless a rule of
    `rates` gives its factor."""
    rates: tuple[RateRule, ...] = ()
    """Learning rates and weight decays for parts of the adapter. The first rule that matches a leaf
    applies; a rule that applies to nothing is an error."""
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
    optimizer_bits: Literal[8, 32] = 32
    """Bits of the stored moments of AdamW. 8: as in bitsandbytes, in blocks of 256 with the dynamic
    map. Leaves with fewer than 4,096 numbers a layer keep `adapter.dtype`, as all do with 32."""
    neftune_alpha: float = 0.0
    """NEFTune: add uniform noise to the embeddings of the training tokens, up to
    alpha / sqrt(L x hidden size) with L tokens in an example. 0: no noise; 5 to 15 are usual."""
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
    dpo: DpoOptions = DpoOptions()

    def __post_init__(self) -> None:
        ok = self.steps is None or self.epochs is None
        accepted = f"null, as train.epochs = {self.epochs} determines it, or no train.epochs"
        require(ok, "train.steps", self.steps, accepted)
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", _STEPS)
        epochs = self.epochs
        ok = epochs is None or 0 < epochs < math.inf
        require(ok, "train.epochs", epochs, "a positive finite number, or null")
        for name in ("steps", "batch_size", "accumulation", "loss_chunk", "keep_checkpoints"):
            value = getattr(self, name)
            ok = value is None or value >= 1
            require(ok, f"train.{name}", value, "a whole number of at least 1")
        limits = ("warmup_steps", "eval_every", "save_every", "early_stopping")
        for name in (*limits, "weight_decay", "neftune_alpha"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.{name}", value, "a finite number of 0 or more")
        ok = self.early_stopping == 0 or self.eval_every > 0
        require(ok, "train.early_stopping", self.early_stopping, "0 with train.eval_every 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "0 <= value < 1")
        for name in ("learning_rate", "lora_plus_ratio", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"train.{name}", value, "a positive finite number")
        bits = self.optimizer_bits
        require(bits in (8, 32), "train.optimizer_bits", bits, "8 or 32")
        for place, rule in enumerate(self.rates):
            field = f"train.rates[{place}]"
            values = {"factor": rule.factor, "weight_decay": rule.weight_decay}
            ok = any(value is not None for value in values.values())
            require(ok, field, rule.match, "a rule with a factor or a weight_decay")
            for name, value in values.items():
                ok = value is None or 0 <= value < math.inf
                require(ok, f"{field}.{name}", value, "a finite number of 0 or more, or null")
        clip = self.clip_norm
        require(clip is None or clip > 0, "train.clip_norm", clip, "a positive number, or null")
        ok = self.batch_size % self.accumulation == 0
        accepted = f"a divisor of train.batch_size = {self.batch_size}"
        require(ok, "train.accumulation", self.accumulation, accepted)

    @property
    def rows(self) -> int:
        """Rows of a forward pass."""
        return self.batch_size // self.accumulation

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps.

        Raises:
            ValueError: it depends on the data (`with_steps`).
        """
        if self.steps is None:
            raise ValueError(f"train.epochs = {self.epochs}: the number of steps is not known yet")
        return self.steps

    def with_steps(self, rows: int) -> "TrainConfig":
        """Replaces `epochs` by the number of steps, for data with this many rows in an epoch."""
        if self.epochs is None:
            return self
        # Rounded, as 0.1 * 30 is more than 3.
        steps = math.ceil(round(self.epochs * rows / self.batch_size, 6))
        return dataclasses.replace(self, steps=max(steps, 1), epochs=None)


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
    the run's calibration, the table shows the plain quantizer and ICQ."""
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
    """Folder with a Hugging Face model (safetensors), its id on the hub, a .gguf file, or a folder
    written by irqlora quantize. With such a folder or a run, unset fields of `quant` come from its
    base."""
    output_dir: str
    """Folder of the run, for the quantized base, checkpoints, metrics and scores."""
    seed: int = 0
    """Random seed of the adapters, the order of the data, and the dropout."""
    quant: QuantConfig = QuantConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        for name in ("model", "output_dir"):
            require(getattr(self, name).strip() != "", name, getattr(self, name), "a folder")
        # A fitted initialization corrects the quantization error.
        ok = self.quant.quantizes or self.adapter.start.fit is None
        require(ok, "adapter.init", self.adapter.init, "default with quant.format none")
        ok = self.data.format == "preference" or self.train.dpo == DpoOptions()
        accepted = f"the default with data.format {self.data.format}, which has no pairs"
        require(ok, "train.dpo", self.train.dpo, accepted)
        ok = self.data.format != "preference" or self.train.neftune_alpha == 0
        noise = self.train.neftune_alpha
        require(ok, "train.neftune_alpha", noise, "0 with data.format preference")
        ok = self.train.lora_plus_ratio == 1 or len(self.adapter.chosen.faster) > 0
        accepted = f"1 with adapter.method {self.adapter.method}, which has no lora_B"
        require(ok, "train.lora_plus_ratio", self.train.lora_plus_ratio, accepted)

    @staticmethod
    def fill(given: dict[str, Any], convert: Convert) -> dict[str, Any]:
        """Adds the settings of a quantized base in `model`, and of a trained adapter in
        `adapter.init_from`; `parse` calls it."""
        return fill_from_adapter(fill_from_base(given, convert), convert, _stored_adapter)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "Config":
        """Reads a YAML file. `overrides` maps dotted names to values, as on the command line.

        If `model` is a folder with a quantized base, fields of `quant` that neither the file nor
        `overrides` sets come from the base.

        Raises:
            ValueError: no such file, unknown key, wrong type or invalid value, or fields of `quant`
                that differ from the base.

        Examples:
            >>> config = Config.load("configs/quickstart.yaml", {"quant.format": "nf4"})
            >>> config.quant.format, config.quant.calibration, config.adapter.method
            ('nf4', 'robust', 'iec')
        """
        return parse(cls, [("config", str(path)), *(overrides or {}).items()], "train.py")


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Quantizes a base once for several runs. Use its folder as their `model`."""

    model: str
    """Folder with a Hugging Face model (safetensors), its id on the hub, or a .gguf file."""
    output_dir: str
    """New folder for the quantized base and its tokenizer."""
    quant: QuantConfig = QuantConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
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
        ValueError: as `Config.load`.
    """
    return parse_flags(Config, argv, "train.py")


def read_stored_config(path: Path) -> Config:
    """Reads the configuration that a run has written, without a look at its `model`.

    Raises:
        ValueError: as `Config.load`.
    """
    return parse(Config, [("config", str(path))], "train.py", fill=False)


def _stored_adapter(path: Path) -> AdapterConfig:
    return read_stored_config(path).adapter


def with_base_settings(config: Config) -> Config:
    """Replaces a `quant` that is `QuantConfig()` by the settings of the base in `config.model`, and
    an `adapter` with nothing but `init_from` by the settings of that adapter, and a budget by the
    rules that the run or the base was made with. A plain LoRA pair of PEFT with the default shape
    starts the default method.

    So in Python, `QuantConfig()` means "not set". `Config.load` knows for each field whether it was
    set.

    Raises:
        FileNotFoundError, ValueError: the base or the adapter is damaged or not there, or the run
            was made for another budget.
    """
    source = config.adapter.source
    if source is not None and config.adapter == AdapterConfig(init_from=source):
        written = {name: getattr(config, name) for name in ("model", "output_dir")}
        written["adapter.init_from"] = source
        convert = lambda name, value: value  # noqa: E731
        found = fill_from_adapter(written, convert, _stored_adapter)
        filled = parse(Config, found.items(), "train.py", fill=False).adapter
        # A pair of PEFT may also start the default method, which the user may have asked for.
        plain = filled == dataclasses.replace(config.adapter, method=LORA.name)
        if not plain or is_run(Path(config.output_dir)) or is_run(adapter_folder(source)):
            config = dataclasses.replace(config, adapter=filled)
    base = find_base(config.model, config.output_dir)
    if config.quant.budget is not None:
        return _with_known_rules(config, None if base is None else base.parent)
    if base is None or config.quant != QuantConfig():
        return config
    return dataclasses.replace(config, quant=read_base_config(base)[1])


def _with_known_rules(config: Config, base: Path | None) -> Config:
    """`base`: folder of the base that is used; None if the run makes its own."""
    folder = Path(config.output_dir) if base is None else base
    known = read_budget(folder)
    if known is None or (base is None and not (folder / "config.json").is_file()):
        return config
    if known[0] == config.quant:
        return dataclasses.replace(config, quant=known[1])
    there, here = quant_settings(known[0]), quant_settings(config.quant)
    name = next(name for name in here if here[name] != there[name])
    raise ValueError(
        f"output_dir = '{config.output_dir}': holds formats for another budget ({name} = "
        f"{shorten(there[name])} there, {shorten(here[name])} here); expected a new folder, or the "
        "same settings"
    )
