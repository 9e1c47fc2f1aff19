"""The whole configuration: frozen dataclasses, read from YAML and dotted overrides.

Every unknown key and every bad value is an error that names the field, the value and what is
accepted. The fields are documented here and nowhere else; `python train.py --help` prints them.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

Parsed = TypeVar("Parsed")
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Format = Literal["nf4", "nf3", "nf2", "fp4", "int4", "int3", "int2", "none"]
DataFormat = Literal[
    "alpaca",
    "input_output",
    "self_instruct",
    "flan_v2",
    "chip2",
    "hh_rlhf",
    "oasst1",
    "chat",
    "text",
]


def _require(ok: bool, field: str, value: Any, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{field} = {value!r}: accepted is {accepted}")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How the frozen linear layers are stored."""

    format: Format = "nf4"
    """Code book. "none" keeps the weights as they are (plain LoRA)."""
    block_size: int = 64
    """Weights that share a scale and a shift; a multiple of 8."""
    calibration: Literal["none", "icq", "joint"] = "icq"
    """"none": scale from the largest weight. "icq": also the shift (NormalFloat, FP4) or the range
    (integers) that maximizes the entropy of each block's codes (IR-QLoRA, section 3.2). "joint":
    the scale and the shift that maximize entropy - error_weight * error / variance."""
    error_weight: float = 100.0
    """Joint only: bits of entropy that a relative squared error of 1 costs. 0: entropy alone; .inf:
    error alone."""
    refine_steps: int = 4
    """Joint only: least-squares steps at the end; a block keeps those by which its error falls."""
    symmetric: bool = False
    """Integers only: zero point fixed in the middle of the codes."""
    search: Literal["range", "zero_point"] = "range"
    """Integers only, what ICQ moves: the "range" as in the released code, or the "zero_point" at a
    fixed scale as in the paper's text."""
    search_range: float = 0.1
    """ICQ only, lambda of the paper: half-width of the search (NormalFloat: in standard deviations
    of the block, integers: as a fraction of the block's range)."""
    search_steps: int | None = None
    """ICQ only, n of the paper: 2n+1 candidates. Null: 100, for integers 50."""
    codes_from: Literal["stored", "exact"] = "stored"
    """Statistics that the codes are computed against: the "stored" (rounded) scale and shift, which
    the dequantizer uses, or the "exact" ones, as the released code does (for parity only)."""

    def __post_init__(self) -> None:
        size = self.block_size
        _require(size > 0 and size % 8 == 0, "quant.block_size", size, "a positive multiple of 8")
        width = self.search_range
        _require(0 < width < 1, "quant.search_range", width, "a number between 0 and 1")
        steps = self.search_steps
        ok = steps is None or steps >= 1
        _require(ok, "quant.search_steps", steps, "a whole number of at least 1, or null")
        weight = self.error_weight
        _require(weight >= 0, "quant.error_weight", weight, "a number from 0 to .inf")
        ok = self.refine_steps >= 0
        _require(ok, "quant.refine_steps", self.refine_steps, "a whole number of at least 0")
        integer = self.format.startswith("int")
        ok = integer or not self.symmetric
        _require(ok, "quant.symmetric", self.symmetric, f"false with quant.format {self.format}")
        ok = integer or self.search == "range"
        _require(ok, "quant.search", self.search, f"range with quant.format {self.format}")
        ok = not (self.symmetric and self.search == "zero_point")
        _require(ok, "quant.search", self.search, "range with quant.symmetric true")
        ok = self.calibration != "joint" or self.search == "range"
        _require(ok, "quant.search", self.search, "range with quant.calibration joint")

    @property
    def label(self) -> str:
        """Format and calibration as a table names them."""
        how = {"none": "", "icq": " + ICQ", "joint": " + joint"}[self.calibration]
        return self.format + how if how else f"plain {self.format}"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The trained low-rank update of the frozen layers."""

    method: Literal["lora", "iec"] = "iec"
    """"lora": QLoRA's pair of matrices. "iec": with the parameter-free connections of IR-QLoRA."""
    rank: int = 64
    """Inner dimension r."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an input feature in front of the matrix A."""
    targets: tuple[str, ...] = LINEAR_NAMES
    """Names of the adapted linear layers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which adapters and optimizer state are kept."""
    init: Literal["default", "loftq"] = "default"
    """Where the training starts. "default": the update is 0. "loftq": the quantized weights and the
    pair are fitted to the weights together (LoftQ), so that the update corrects most of what
    quantization costs; the base then belongs to this run alone. In Python: `hf.load_loftq`."""
    loftq_iterations: int = 3
    """Turns of LoftQ, of which the best is kept."""
    connections: Literal["both", "u1", "u2"] = "both"
    """IEC only: which of the two connections is learned, that around A ("u1"), that around B ("u2")
    or both (IR-QLoRA, table 4). The scalar of the other one stays 0."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "adapter.rank", self.rank, "a whole number of at least 1")
        _require(self.alpha > 0, "adapter.alpha", self.alpha, "a positive number")
        _require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "0 <= dropout < 1")
        _require(len(self.targets) > 0, "adapter.targets", self.targets, "at least one name")
        ok = self.method == "iec" or self.connections == "both"
        _require(ok, "adapter.connections", self.connections, "both with adapter.method lora")
        turns = self.loftq_iterations
        ok = turns >= 1
        _require(ok, "adapter.loftq_iterations", turns, "a whole number of at least 1")
        for name in self.targets:
            _require(name in LINEAR_NAMES, "adapter.targets", name, ", ".join(LINEAR_NAMES))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    train: str = ""
    """Local file (.json, .jsonl, .csv, .tsv, .parquet or .txt), or a data set on the Hugging Face
    hub: ID, ID:CONFIGURATION or ID:CONFIGURATION:SPLIT (default: the split train)."""
    eval: str | None = None
    """Like `train`, for the evaluation loss. Null: `eval_fraction` of the training rows."""
    eval_fraction: float = 0.0
    """Share of the training rows held out for the evaluation loss when `eval` is null."""
    format: DataFormat = "alpaca"
    """Columns of a row. "alpaca" (also alpaca-cleaned): instruction, input, output. "input_output"
    (also longform): input, output. "self_instruct": prompt, completion. "flan_v2": inputs, targets.
    "chip2": text of <human>: and <bot>:. "hh_rlhf": chosen, "oasst1": text with all turns, or the
    messages of the original trees; both learn every turn. "chat": messages of role and content,
    written by the chat template, of which the assistant's are learned. "text": plain text."""
    source_length: int = 384
    """Longest prompt, in tokens; longer prompts are cut on the left."""
    target_length: int = 128
    """Longest answer, in tokens; longer answers are cut on the right. Formats without a prompt of
    their own (hh_rlhf, oasst1, chat) are cut to source_length + target_length."""
    train_on_source: bool = False
    """Put the loss on the prompt too."""
    sequence_length: int = 256
    """Plain text only: tokens of one training example."""
    max_examples: int | None = None
    """Use at most this many rows (null: all)."""
    chat_template: str | None = None
    """Chat only: file with a Jinja template, for a tokenizer that has none or another one."""
    group_by_length: bool = False
    """Put examples of similar length into a batch: less padding, a somewhat less random order."""
    packing: bool = False
    """Put several examples into one row, each seeing itself alone: hardly any padding. Then
    train.batch_size counts rows."""
    packing_length: int | None = None
    """Tokens of a packed row. Null: the longest that an example can have."""

    def __post_init__(self) -> None:
        share = self.eval_fraction
        _require(0 <= share < 1, "data.eval_fraction", share, "0 <= eval_fraction < 1")
        for name in ("source_length", "target_length", "sequence_length", "packing_length"):
            value = getattr(self, name)
            ok = value is None or value >= 2
            _require(ok, f"data.{name}", value, "a whole number of at least 2")
        ok = not (self.packing and self.group_by_length)
        _require(ok, "data.group_by_length", self.group_by_length, "false with data.packing true")
        limit = self.max_examples
        ok = limit is None or limit >= 1
        _require(ok, "data.max_examples", limit, "a whole number of at least 1, or null")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimization; the defaults are the paper's for LLaMA 7B and 13B (appendix B.4)."""

    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 16
    """Examples of one optimizer step."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warmup: constant, or down to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.999
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: term added to the root of the second moment."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay."""
    clip_norm: float | None = 0.3
    """Largest norm of the gradient (null: no clipping)."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the activations; float16 scales the loss. Null: what the device is fastest in,
    bfloat16, or float16 on GPUs before compute capability 8.0 (such as T4), or float32 on CPUs. A
    run keeps the type that it began with."""
    attention: Literal["xla", "cudnn"] | None = None
    """How attention is computed. Null: by cuDNN's flash attention where it can serve (an NVIDIA GPU
    of compute capability 8.0 or more, half precision, rows that are not packed), else by XLA, some
    queries after the others."""
    matmul: Literal["xla", "mosaic", "triton"] | None = None
    """How packed weights are multiplied: by XLA, or by a kernel for GPUs (kernels/README.md). Null:
    by a kernel where it was measured to be faster, else by XLA."""
    remat: bool = True
    """Recompute the activations of a layer in the backward pass instead of keeping them."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in pinned memory of the host (QLoRA's paged optimizer): less
    memory on the device, the same result; a step waits while they travel."""
    loss_chunk: int = 1024
    """Positions whose logits exist at one time when the loss is computed."""
    eval_every: int = 0
    """Steps between evaluation losses (0: only at the end)."""
    save_every: int = 0
    """Steps between checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the one with the best evaluation loss and, of LoftQ, that of
    step 0; others are deleted."""
    early_stopping: int = 0
    """End after so many evaluations in a row without a better loss (0: never)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "loss_chunk", "keep_checkpoints"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}", value, "a whole number of at least 1")
        for name in ("warmup_steps", "eval_every", "save_every", "weight_decay", "early_stopping"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}", value, "0 or more")
        ok = self.early_stopping == 0 or self.eval_every > 0
        _require(ok, "train.early_stopping", self.early_stopping, "0 with train.eval_every 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"train.{name}", value, "0 <= value < 1")
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            _require(value > 0, f"train.{name}", value, "a positive number")
        clip = self.clip_norm
        _require(clip is None or clip > 0, "train.clip_norm", clip, "a positive number, or null")
        ok = self.batch_size % self.accumulation == 0
        accepted = f"a divisor of train.batch_size = {self.batch_size}"
        _require(ok, "train.accumulation", self.accumulation, accepted)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are used. Their number is data x fsdp x tensor."""

    data: int | None = None
    """Copies of the model that share the rows of a batch. Null: as many as the devices give."""
    fsdp: int = 1
    """Parts that weights and rows are both split into; a part is sent when it is needed."""
    tensor: int = 1
    """Parts that every matrix product is split into."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            ok = value is None or value >= 1
            _require(ok, f"mesh.{name}", value, "a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is measured beside the evaluation loss."""

    questions: str | None = None
    """Multiple-choice questions (.jsonl: subject, prompt, choices, answer), asked at the end."""
    max_questions: int | None = None
    """Ask only the first so many (null: all)."""
    baselines: bool = False
    """Also measure the full-precision model and the quantizers without a finetune, for a table."""
    samples: tuple[str, ...] = ()
    """Prompts (with data.format alpaca: instructions) that are answered at every evaluation."""
    sample_tokens: int = 64
    """Longest answer to a sample, in tokens."""

    def __post_init__(self) -> None:
        limit = self.max_questions
        ok = limit is None or limit >= 1
        _require(ok, "evaluate.max_questions", limit, "a whole number of at least 1, or null")
        size = self.sample_tokens
        _require(size >= 1, "evaluate.sample_tokens", size, "a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is shown while training."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run's folder (needs the extra tb)."""
    wandb: str | None = None
    """Also send the metrics to this project of Weights & Biases (needs the extra wandb)."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "log.every", self.every, "a whole number of at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: str
    """Folder with a Hugging Face LLaMA (safetensors), its id on the hub, or a folder written by
    `irqlora quantize`."""
    output_dir: str
    """Folder of the run: quantized base, checkpoints, metrics, scores."""
    seed: int = 0
    """Seed of the adapters, the order of the data and the dropout."""
    quant: QuantConfig = QuantConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        # LoftQ corrects the error of the quantizer.
        ok = self.quant.format != "none" or self.adapter.init == "default"
        _require(ok, "adapter.init", self.adapter.init, "default with quant.format none")

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "Config":
        """Reads a YAML file; `overrides` maps dotted names to values, as on the command line.

        Raises:
            ValueError: no such file, unknown key, wrong type or value that is not accepted.

        Examples:
            >>> config = Config.load("configs/quickstart.yaml", {"quant.format": "nf4"})
            >>> config.quant.format, config.quant.calibration, config.adapter.method
            ('nf4', 'icq', 'iec')
        """
        argv = [f"--config={path}"]
        for name, value in (overrides or {}).items():
            written = value if isinstance(value, str) else json.dumps(value)
            argv.append(f"--{name}={'.inf' if value == math.inf else written}")
        return parse_config(argv)


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Quantizes a base once, for many runs to share: give its folder as their `model`."""

    model: str
    """Folder with a Hugging Face LLaMA (safetensors), or its id on the hub."""
    output_dir: str
    """New folder for the quantized base and the tokenizer."""
    quant: QuantConfig = QuantConfig()
    progress: bool = True
    """Show a progress bar."""


def parse_config(argv: Sequence[str]) -> Config:
    """The configuration on a command line: `--config FILE` and `--section.key value` overrides.

    Raises:
        ValueError: no such file, unknown key, wrong type or value that is not accepted.
    """
    return parse_flags(Config, argv, "train.py")


def parse_flags(kind: type[Parsed], argv: Sequence[str], script: str) -> Parsed:
    """A dataclass from flags and, with `--config`, from a YAML file that the flags override.

    A switch (true or false) may stand without a value: `--baseline` is `--baseline=true`.

    Raises:
        ValueError: no such file, unknown key, wrong type or value that is not accepted.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=script,
        usage=f"{script} [--config FILE] [--field VALUE | --section.field VALUE ...]",
        exit_on_error=False,
        description=kind.__doc__,
    )
    parser.add_argument("--config", action="config", help="YAML file; flags override it.")
    parser.add_class_arguments(kind, as_group=False)
    switches = set(_switches(kind))
    values = [
        f"{flag}=true" if flag in switches and (after is None or after[:2] == "--") else flag
        for flag, after in itertools.zip_longest(argv, argv[1:])
    ]
    try:
        fields = vars(parser.instantiate(parser.parse_args(values)))
    except jsonargparse.ArgumentError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{text} ({script} --help lists every field)") from error
    fields.pop("config")
    return kind(**fields)


def _switches(kind: type, prefix: str = "--") -> Iterator[str]:
    """The flags that are true or false, or may be."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _switches(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.type in (bool, bool | str):
            yield prefix + field.name
