"""The configuration: frozen dataclasses, read from YAML and dotted overrides.

An unknown key or invalid value is an error that names the field, the value and the accepted values.
The fields are documented only here; `python train.py --help` prints the documentation.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, cast

from irqlora_jax.adapters import config as adapter
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.file import BASE_FILE, read_base_config, read_source
from irqlora_jax.data.config import DataConfig
from irqlora_jax.quant import config as quant
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import MeshConfig
from irqlora_jax.text import read_text, refusal, require, shorten

Parsed = TypeVar("Parsed")
_RENAMED = {
    f"{section}.{old}": ".".join((section, *new))
    for section, names in (("quant", quant.RENAMED), ("adapter", adapter.RENAMED))
    for old, new in names.items()
}
"""Current names of fields by their other names."""


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
    irqlora quantize. With such a folder or a run, unset fields of `quant` come from its base."""
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
        for name in ("model", "output_dir"):
            require(getattr(self, name).strip() != "", name, getattr(self, name), "a folder")
        # A fitted initialization corrects the quantization error.
        ok = self.quant.quantizes or self.adapter.start.fit is None
        require(ok, "adapter.init", self.adapter.init, "default with quant.format none")

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
            ('nf4', 'joint', 'iec')
        """
        return _parse(cls, [("config", str(path)), *(overrides or {}).items()], "train.py")


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
        ValueError: as `Config.load`.
    """
    return parse_flags(Config, argv, "train.py")


def parse_flags(kind: type[Parsed], argv: Sequence[str], script: str) -> Parsed:
    """Makes a dataclass from flags and, with `--config`, YAML files. Later values override earlier.

    The value of a boolean flag is optional: `--baseline` means `--baseline=true`.

    Raises:
        ValueError: no such file, unknown key, wrong type or invalid value. For a configuration of a
            run: also as `Config.load`.
        SystemExit: help or the configuration was asked for, and printed.
    """
    names = [flag.partition("=")[0] for flag in argv]
    if "-h" in names or any(re.fullmatch(r"--([\w.]+\.)?help", name) for name in names):
        _print_help(kind, argv, script)
    flags = [flag for flag in argv if flag != "--print_config"]
    parsed = _parse(kind, list(_split_flags(dict(_fields(kind)), flags, script)), script)
    if len(flags) < len(argv):
        import yaml

        values = json.loads(
            json.dumps(dataclasses.asdict(cast(Any, parsed)))
        )  # tuples become lists
        print(yaml.safe_dump(values, sort_keys=False), end="")
        raise SystemExit(0)
    return parsed


def read_stored_config(path: Path) -> Config:
    """Reads the configuration that a run has written, without a look at its `model`.

    Raises:
        ValueError: as `Config.load`.
    """
    values = _read_config(dict(_fields(Config)), str(path), "train.py")
    return _build(Config, values, "train.py")


def with_base_settings(config: Config) -> Config:
    """Replaces a `quant` that is `QuantConfig()` by the settings of the base in `config.model`.

    So in Python, `QuantConfig()` means "not set". `Config.load` knows for each field whether it was
    set.

    Raises:
        ValueError: the base is damaged.
    """
    base = _find_base(config.model, config.output_dir)
    if base is None or config.quant != QuantConfig():
        return config
    return dataclasses.replace(config, quant=read_base_config(base)[1])


def check_settings(asked: Mapping[str, Any], stored: QuantConfig, source: str | Path) -> None:
    """Checks that settings of the quantization are those of a base.

    Args:
        asked: dotted names of fields of `quant`, and their values.
        stored: of the base.
        source: folder of the base, for the error message.

    Raises:
        ValueError: they differ; the message names all that do.
    """
    there = quant_settings(stored)
    wrong = [name for name in there if name in asked and asked[name] != there[name]]
    if wrong:
        ours = ", ".join(f"{name} = {shorten(asked[name])}" for name in wrong)
        theirs = ", ".join(f"{name} = {shorten(there[name])}" for name in wrong)
        raise ValueError(
            f"{ours}: the base in '{source}' is quantized with {theirs}; expected the same, or "
            "nothing, because unset fields of quant come from the base"
        )


def quant_settings(config: QuantConfig) -> dict[str, Any]:
    """Returns the fields of `quant` by dotted name (`quant.icq.steps`)."""
    return dict(_leaves(config, "quant."))


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _find_base(model: str, output_dir: str) -> Path | None:
    """Returns the file of the base that a run with this model continues to use, if there is one."""
    run, file = (os.path.join(folder, BASE_FILE) for folder in (output_dir, model))
    # A run continues with its base, even if the folder that the base came from is gone. If the run
    # made the base itself, its settings are those of the configuration.
    is_run = os.path.isfile(run) and os.path.isfile(os.path.join(output_dir, "config.json"))
    if is_run and read_source(Path(run)) != model:
        return Path(run)
    return Path(file) if os.path.isfile(file) else None


def _with_base_settings(
    known: Mapping[str, Any], given: dict[str, Any], script: str
) -> dict[str, Any]:
    """Adds the settings of the base in `model` that are not given.

    Raises:
        ValueError: given settings differ from the base, or the base is damaged.
    """
    model, output_dir = given.get("model"), given.get("output_dir")
    if not isinstance(model, str) or not isinstance(output_dir, str):
        return given  # refused later
    base = _find_base(model, output_dir)
    if base is None:
        return given
    stored = read_base_config(base)[1]
    settings = quant_settings(stored)
    asked = {n: _convert(n, known[n], given[n], script) for n in settings if n in given}
    check_settings(asked, stored, base.parent)
    return settings | given


def _parse(kind: type[Parsed], values: Iterable[tuple[str, Any]], script: str) -> Parsed:
    """Makes a dataclass from dotted names and values; "config" names a file with more of them."""
    known = dict(_fields(kind))
    given: dict[str, Any] = {}
    for name, value in values:
        if name == "config":
            given |= _read_config(known, value, script)
        else:
            given |= _flatten(known, {name: value}, "--", "", script)
    if issubclass(kind, Config):
        given = _with_base_settings(known, given, script)
    return _build(kind, given, script)


def _print_help(kind: type, argv: Sequence[str], script: str) -> NoReturn:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=script,
        usage=f"{script} [--config FILE] [--field VALUE | --section.field VALUE ...]",
        description=kind.__doc__,
        print_config=None,
    )
    parser.add_argument(
        "--config", action="config", help="YAML or JSON file. Flags that follow override it."
    )
    parser.add_argument("--print_config", action="store_true", help="Print the configuration.")
    parser.add_class_arguments(kind, as_group=False)
    for flag in argv:
        if re.fullmatch(r"--[\w.]+\.help", flag) and flag.startswith("--quant.rules"):
            parser.parse_args([flag])
    parser.print_help()
    raise SystemExit(0)


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted names and the types of all sections and fields."""
    for field in dataclasses.fields(kind):
        yield prefix + field.name, field.type
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")


def _split_flags(
    known: Mapping[str, Any], argv: Sequence[str], script: str
) -> Iterator[tuple[str, str]]:
    """Splits a command line into names and values."""
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(
                f"{shorten(flag)}: not a flag; expected --FIELD VALUE "
                f"({script} --help lists every field)"
            )
        name, equals, value = flag[2:].partition("=")
        name = _RENAMED.get(name, name)
        if name != "config":
            _check_known(name, known, "--", script)
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and known.get(name) in (bool, bool | str):
            value = "true"
        elif not equals:
            raise ValueError(f"--{name}: no value follows; expected --{name} VALUE")
        yield name, value


def _check_known(name: str, known: Mapping[str, Any], written: str, script: str) -> None:
    if name in known:
        return
    last = name.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for other in known:
        by_last.setdefault(other.rpartition(".")[2], []).append(other)
    # A misspelled name, or the same or a similar one in another section.
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8) or by_last.get(last, [])
    if not near:
        similar = difflib.get_close_matches(last, by_last, n=1)
        near = [other for one in similar for other in by_last[one]]
    start = "--" if written == "--" else ""
    hint = f"; did you mean {' or '.join(start + other for other in near[:3])}?" if near else ""
    raise ValueError(
        f"{written}{shorten(name, quoted=False)}: unknown field{hint} "
        f"({script} --help lists every field)"
    )


def _flatten(
    known: Mapping[str, Any], values: Mapping[Any, Any], written: str, prefix: str, script: str
) -> dict[str, Any]:
    """Returns the values of fields by dotted name. Sections without a value are left out.

    Args:
        known: names and types of all sections and fields.
        values: nested values of sections and fields. Names may be dotted.
        written: stands in front of a name in error messages.
        prefix: of the names.
        script: for the error message about an unknown field.

    Raises:
        ValueError: an unknown field, one that appears twice, or a section without fields.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = _RENAMED.get(f"{prefix}{key}", f"{prefix}{key}")
        _check_known(name, known, written, script)
        if not dataclasses.is_dataclass(known[name]):
            found = {name: value}
        else:
            if isinstance(value, str):
                loaded = _read_text(value)
                value = _read_mapping(value) if os.path.isfile(value) else loaded
            accepted = "a section with fields"
            require(value is None or isinstance(value, dict), written + name, value, accepted)
            found = _flatten(known, value or {}, written, f"{name}.", script)
        for name in flat.keys() & found.keys():
            raise ValueError(f"{written}{name} appears twice: expected every key once")
        flat |= found
    return flat


def _read_config(known: Mapping[str, Any], path: str, script: str) -> dict[str, Any]:
    """Reads the values of a configuration file by dotted name.

    Raises:
        ValueError: the file cannot be read, or is not of this form; a key is unknown or appears
            twice.
    """
    return _flatten(known, _read_mapping(path), f"{path}: ", "", script)


def _read_mapping(path: str) -> dict[Any, Any]:
    import yaml

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
            values = yaml.load(text, _yaml_loader())
            repeated.extend(_repeated_keys(yaml.compose(text, _yaml_loader())))
    except OSError as error:
        raise ValueError(f"config = {shorten(path)}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg})") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise ValueError(f"{where}: not valid YAML ({problem or 'bad character'})") from error
    if repeated:
        raise ValueError(f"{path}: {repeated[0]} appears twice: expected every key once")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no fields; expected lines such as 'model: FOLDER'")
    return values


@functools.cache
def _yaml_loader() -> Any:
    """Loads "1e-4" as a number and dates as text, unlike YAML 1.1."""
    import yaml

    fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(fastest):
        yaml_implicit_resolvers: ClassVar = {
            first: [pair for pair in pairs if not pair[0].endswith((":float", ":timestamp"))]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    number = r"[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)"
    special = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    pattern = re.compile(f"^(?:{number}|{special})$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))
    return Loader


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


def _build(kind: type[Parsed], given: Mapping[str, Any], script: str, prefix: str = "") -> Parsed:
    """Makes a dataclass from the values of its fields by dotted name.

    Raises:
        ValueError: a required field has no value, or a value has the wrong type or is invalid.
    """
    values: dict[str, Any] = {}
    missing: list[str] = []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name, inner = prefix + field.name, cast(Any, field.type)
        if dataclasses.is_dataclass(inner):
            if any(other.startswith(f"{name}.") for other in given):
                values[field.name] = _build(cast(Any, inner), given, script, f"{name}.")
        elif name in given:
            values[field.name] = _convert(name, inner, given[name], script)
        elif field.default is dataclasses.MISSING:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{' and '.join(missing)}: no value, but one is required "
            f"({script} --help lists every field)"
        )
    return kind(**values)


def _convert(name: str, kind: Any, value: Any, script: str) -> Any:
    """Converts a value from a file or a flag to the type of its field.

    Where the field is not text, text is read as YAML.

    Raises:
        ValueError: another type.
    """
    if typing.get_origin(kind) is tuple:
        return _convert_list(name, kind, value, script)
    kinds = _alternatives(kind)
    if types.NoneType in kinds and (value is None or value in ("null", "~")):
        return None
    for one in kinds:
        if typing.get_origin(one) is Literal:
            if isinstance(value, str) and value in typing.get_args(one):
                return value
            continue
        found: Any = _read_text(value) if isinstance(value, str) and one is not str else value
        if one is float and type(found) is int and abs(found) < _LIMIT:
            return float(found)
        # A bool is an int for isinstance.
        if type(found) is one and (one is not int or abs(found) < _LIMIT):
            return found
    quotes = " in quotes" if str in kinds and isinstance(value, int | float) else ""
    raise refusal(name, value, _in_words(kind) + quotes)


_LIMIT = 2**63
"""Larger numbers do not fit into an integer of 64 bits."""


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def _convert_list(name: str, kind: Any, value: Any, script: str) -> tuple[Any, ...]:
    """Converts a list. A single value, also as text, stands for a list of one."""
    inner: Any = typing.get_args(kind)[0]
    found = _read_text(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        ok = found is not None and not (isinstance(value, str) and value.startswith("["))
        require(ok, name, value, _in_words(kind))
        found = [value if inner is str else found]
    if not dataclasses.is_dataclass(inner):
        require(all(isinstance(one, inner) for one in found), name, value, _in_words(kind))
        return tuple(found)
    made: list[Any] = []
    one: Any
    for place, one in enumerate(found):
        prefix = f"{name}[{place}]."
        if not isinstance(one, inner):
            require(isinstance(one, dict), prefix[:-1], one, _in_words(inner))
            fields = _flatten(dict(_fields(inner, prefix)), one, "", prefix, script)
            one = _build(inner, fields, script, prefix)
        made.append(one)
    return tuple(made)


def _read_text(text: str) -> Any:
    """Reads a value from text, or returns the text if it is no YAML."""
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except (yaml.YAMLError, ValueError):  # int() refuses numbers of more than 4300 digits
        return text


def _in_words(kind: Any) -> str:
    """Says which values a field accepts."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        many = "[a, b]" if inner is str else "[{match: PATTERN, format: nf4}]"
        return f"a list such as {many}, or a single value"
    if dataclasses.is_dataclass(kind):
        return f"a section with {' or '.join(field.name for field in dataclasses.fields(kind))}"
    words: dict[Any, str] = {bool: "true or false", int: "a whole number"}
    words |= {float: "a number", str: "text", types.NoneType: "null"}
    accepted: list[str] = []
    for one in _alternatives(kind):
        is_choice = typing.get_origin(one) is Literal
        accepted += typing.get_args(one) if is_choice else [words[one]]
    *most, last = accepted
    return f"{', '.join(most)} or {last}" if most else last
