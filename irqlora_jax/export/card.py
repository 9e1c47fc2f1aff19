"""The model card of an exported folder: description, usage, recipe and scores."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irqlora_jax.adapters.lora import LORA
from irqlora_jax.config import Config, RateRule
from irqlora_jax.data.config import DataSource
from irqlora_jax.export.programs import PROGRAMS
from irqlora_jax.files.hub import is_hub_id
from irqlora_jax.model.families import FAMILIES
from irqlora_jax.quant.calibrations import CALIBRATIONS, PLAIN
from irqlora_jax.quant.config import TITLES, QuantConfig, QuantRule

_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
"""
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {adapter})
tokenizer = AutoTokenizer.from_pretrained({adapter})
"""
_LOAD_SCALARS = """import irqlora_jax as irq
{fetch}
adapters = irq.hf.load_adapter({adapter}, model)  # model: irq.Llama with the base below
"""

_FETCH = """from huggingface_hub import snapshot_download
"""

_QUANTIZED = """```sh
{fetch}irqlora chat --run {name}
irqlora eval --run {name}
irqlora train --config FILE --model {name}
```"""


@dataclasses.dataclass(frozen=True)
class Card:
    """Content of the model card of an exported folder.

    Attributes:
        name: of the folder; "NAME/adapter" of the adapter in the folder of a model.
        kind: what it holds: a kind of `ExportConfig`.
        dtype: of its weights.
        model: folder or hub id of the original model; None if unknown.
        quant: how the base was quantized; None if it was not.
        config: of the run; None for a base alone.
        step: of the checkpoint; None for a base alone.
        newest: whether the checkpoint is the run's newest, which `scores` describe.
        base: for adapters, folder or hub id of the weights they were trained on, if known.
        folded: for adapters, whether IEC is folded into the plain LoRA pair.
        scores: from `runs.load.scores`.
        calibrate: the text that the base was calibrated with (`base.file.read_calibrate`).
        model_type: of the architecture, a name in `FAMILIES`.
        beside: whether the adapter has files of its own; for the kinds of `PROGRAMS`.
        repository: on the hub, for which the folder is written; None if it stays here.
    """

    name: str
    kind: str
    dtype: str
    model: str | None
    quant: QuantConfig | None
    config: Config | None
    step: int | None
    newest: bool
    base: str | None
    folded: bool
    scores: Mapping[str, Any]
    calibrate: Mapping[str, Any] | None = None
    model_type: str = "llama"
    beside: bool = False
    repository: str | None = None

    def text(self) -> str:
        """Text of README.md, with the hub's front matter. Folders appear by name, without path."""
        parts = [
            self._front(),
            f"# {self._title}",
            self._about(),
            "## Use",
            self._use(),
            "## Recipe",
            self._recipe(),
        ]
        tables = _score_tables(self.scores)
        if tables:
            parts += ["## Scores", *tables]
            if not self.newest:
                parts.append(
                    f"The weights are those of step {self.step}; the scores are of the last step."
                )
        return "\n\n".join(parts) + "\n"

    def _front(self) -> str:
        quantized = [] if self.quant is None else [self.quant.format]
        if self.quant is not None and self.quant.calibration != PLAIN.name:
            quantized.append(self.quant.calibration)
        method = [] if self.config is None else ["lora", self.config.adapter.method]
        tags = list(dict.fromkeys([self.model_type, "ir-qlora", *method, *quantized]))
        # The hub refuses a card with a base that cannot be on the hub.
        known = self.model and (is_hub_id(self.model) or not self.repository)
        lines = [f"base_model: {public_name(self.model)}"] if self.model and known else []
        library = "peft" if self.kind == "adapter" else "transformers"
        if self.kind in PROGRAMS:
            library = PROGRAMS[self.kind].library
        lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
        return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])

    def _about(self) -> str:
        origin = public_name(self.model) if self.model else f"a {FAMILIES[self.model_type].title}"
        quantized = "in full precision"
        if self.quant is not None:
            quantized = f"quantized to {self.quant.format}"
            if self.quant.calibration != PLAIN.name or self.quant.rules:
                quantized += f" with {CALIBRATIONS[self.quant.calibration].description}"
                quantized += " of scales without shifts" * self.quant.scales_alone
            if self.quant.rounding == "feedback":
                quantized += ", rounded with error feedback"
            if self.quant.training != "none":
                quantized += f", trained layer by layer ({TITLES[self.quant.training]})"
            if self.quant.outliers:
                quantized += f", {100 * self.quant.outliers:.3g} % of the weights in 16 bits"
            if self.calibrate is not None:
                text = self.calibrate
                quantized += (
                    f" (calibrated with {text['rows']} rows of {text['length']} tokens of "
                    f"{public_name(text['data']) if text['data'] else 'a text'})"
                )
        method = LORA if self.config is None else self.config.adapter.chosen
        trained = method.description
        if self.config is not None and self.config.adapter.scales:
            trained += " and trained scales and shifts of the base"
        finetuned = f"{origin}, {quantized}, finetuned with {trained} by irqlora_jax"
        if self.kind == "quantized":
            return (
                f"{finetuned}. The adapter is part of the scales and shifts of the quantized base, "
                f"exactly but for their rounding to {self.dtype}. The codes did not change."
            )
        if self.kind in PROGRAMS:
            whole = f"{origin}, {quantized} by irqlora_jax" if self.config is None else finetuned
            place = "is part of these weights"
            if self.beside:
                place = f"is in `{PROGRAMS[self.kind].adapter}`"
            own = "" if self.config is None else f" The finetuned adapter {place}."
            return f"{whole}. {PROGRAMS[self.kind].about.format(type=self.dtype)}{own}"
        if self.kind == "merged":
            if self.config is None:
                return f"{origin}, {quantized} and dequantized to {self.dtype} by irqlora_jax."
            return (
                f"{finetuned}. The adapter is merged into the dequantized weights. The sums were "
                f"computed in float32 and rounded once, to {self.dtype}."
            )
        if self.kind == "dequantized":
            text = f"{origin}, {quantized} and dequantized to {self.dtype} by irqlora_jax."
            if self.config is None:
                return text
            changed = " Its scales and shifts are the trained ones." * bool(
                self.config.adapter.scales
            )
            return f"{text}{changed} `adapter/` has the finetuned adapter."
        about = f"The adapter of {finetuned}."
        own = [f"`{name}`" for name in method.files.values() if name not in LORA.files.values()]
        form = f"The tensors of {method.title} are kept ({', '.join(own)})."
        if method.peft is not None and (method.fold is None or not self.folded):
            return about if method is LORA else f"{about} PEFT loads it as {method.title}."
        if self.folded:
            form = f"{method.title} is folded into a plain LoRA pair that computes the same update."
        return f"{about} {form}" if own else about

    @property
    def _title(self) -> str:
        _, slash, inside = self.name.partition("/")
        return f"{self.repository}{slash}{inside}" if self.repository else self.name

    def _place(self, inside: str = "") -> str:
        """The arguments of from_pretrained for the folder, or for a folder inside of it."""
        if self.repository is None:
            return f'"{self.name}/{inside}"' if inside else f'"{self.name}"'
        inside = inside or self.name.partition("/")[2]
        return f'"{self.repository}"' + (f', subfolder="{inside}"' if inside else "")

    def _use(self) -> str:
        if self.kind in PROGRAMS:
            program = PROGRAMS[self.kind]
            use = program.use_adapter if self.beside else program.use
            fetch = ""
            if self.repository is not None:
                download = f"hf download {self.repository} --local-dir {self.name}"
                fetch = f"```sh\n{download}\n```\n\n"
            return fetch + use.format(name=self.name)
        if self.kind == "quantized":
            fetch = ""
            if self.repository is not None:
                fetch = f"hf download {self.repository} --local-dir {self.name}\n"
            return _QUANTIZED.format(name=self.name, fetch=fetch)
        if self.kind == "merged" or self.config is None:
            return _python(_LOAD.format(name=self._place()))
        if not self.folded and self.config.adapter.chosen.peft is None:
            note = "PEFT ignores tensors that it does not know, so its outputs would be wrong."
            adapter, fetch = self._place(), ""
            if self.repository is not None:
                adapter, fetch = f'snapshot_download("{self.repository}")', _FETCH
            code = _python(_LOAD_SCALARS.format(adapter=adapter, fetch=fetch))
            return f"{code}\n\n{note} {self._warning()}"
        base, adapter = self._place(), self._place("adapter")
        if self.kind == "adapter":
            base = public_name(self.base) if self.base else "FOLDER OF THE DEQUANTIZED BASE"
            base, adapter = f'"{base}"', self._place()
        code = _python(_LOAD_ADAPTER.format(base=base, adapter=adapter))
        return f"{code}\n\n{self._warning()}"

    def _warning(self) -> str:
        if self.quant is None:
            return "The adapter works only with the weights named above."
        other = "other scales" if self.quant.scales_alone else "no shifts"
        return (
            "The adapter works only with the dequantized weights, on which it was trained. "
            "`irqlora export --kind dequantized` writes them. The original weights, or another "
            f"quantization of them (bitsandbytes' NF4 has {other}), do not have the errors that "
            "it corrects."
        )

    def _recipe(self) -> str:
        rows: list[tuple[str, Any]] = []
        if self.model:
            rows.append(("model", public_name(self.model)))
        rows.append(("quant", _settings(self.quant or QuantConfig(format="none"))))
        if self.config is not None:
            for name in ("adapter", "data", "train"):
                rows.append((name, _settings(getattr(self.config, name))))
            if self.config.data.format == "preference":
                rows.append(("dpo", _settings(self.config.train.dpo)))
            rows += [("seed", self.config.seed), ("step", self.step)]
        return _table(("", "settings"), rows)


def public_name(source: str) -> str:
    """Returns a hub id unchanged, and a folder or file by its name without the path."""
    return source if is_hub_id(source) else Path(source).expanduser().absolute().name


def _python(code: str) -> str:
    return f"```python\n{code}```"


def _settings(section: Any) -> str:
    if isinstance(section, QuantConfig) and not section.quantizes:
        return "format none"
    words = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):  # options of a method
            chosen = (getattr(section, name, None) for name in ("calibration", "method", "init"))
            if field.name in chosen:
                words.append(f"{field.name}: {_settings(value).replace(';', ',')}")
            continue
        if field.name in ("train", "eval", "chat_template", "init_from") and value:
            several = isinstance(value, tuple)
            value = ", ".join(map(_source, value)) if several else public_name(value)
        if value not in (None, "", ()):
            value = ", ".join(map(_word, value)) if isinstance(value, tuple) else value
            words.append(f"{field.name} {value}")
    return "; ".join(words)


def _source(source: DataSource) -> str:
    name, weight = public_name(source.path), source.weight
    facts: dict[str, Any] = {
        "weight": None if weight is None else f"{weight:g}",
        "format": source.format,
    }
    facts["max_examples"] = source.max_examples
    words = [f"{field} {value}" for field, value in facts.items() if value is not None]
    return f"{name} ({', '.join(words)})" if words else name


def _word(value: Any) -> str:
    if isinstance(value, QuantRule):
        changes = (f"{name} {change}" for name, change in value.overrides.items())
        return f"{value.match} ({' '.join(changes)})"
    if isinstance(value, RateRule):
        given = {name: each for name, each in vars(value).items() if each is not None}
        return f"`{json.dumps(given)}`"
    return str(value)


def _score_tables(scores: Mapping[str, Any]) -> list[str]:
    """Tables of results.json and of all numbers in the files of evaluations."""
    tables = []
    results = scores.get("results") or []
    if results:
        names = [name for name in results[0] if any(row[name] is not None for row in results)]
        rows = [tuple(row[name] for name in names) for row in results]
        tables.append(_table(names, rows))
    rows = [
        (name.removeprefix("eval-"), measure, value)
        for name, result in scores.items()
        if name != "results"
        for measure, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if rows:
        tables.append(_table(("evaluation", "measure", "value"), rows))
    return tables


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = [[name.replace("_", " ") for name in head], ["---"] * len(head)]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
