"""The model card of an exported folder: description, usage, recipe and scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irqlora_jax.adapters.lora import LORA
from irqlora_jax.config import Config
from irqlora_jax.files.hub import is_hub_id
from irqlora_jax.model.families import FAMILIES
from irqlora_jax.quant.calibrations import CALIBRATIONS, PLAIN
from irqlora_jax.quant.config import TITLES, QuantConfig, QuantRule

_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{adapter}")
tokenizer = AutoTokenizer.from_pretrained("{adapter}")
"""
_LOAD_SCALARS = """import irqlora_jax as irq

adapters = irq.hf.load_adapter("{adapter}", model)  # model: irq.Llama with the base below
"""

_QUANTIZED = """```sh
irqlora chat --run {name}
irqlora eval --run {name}
irqlora train --config FILE --model {name}
```"""


@dataclasses.dataclass(frozen=True)
class Card:
    """Content of the model card of an exported folder.

    Attributes:
        name: of the folder.
        kind: what it holds: "adapter", "merged" or "dequantized".
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

    def text(self) -> str:
        """Text of README.md, with the hub's front matter. Folders appear by name, without path."""
        parts = [
            self._front(),
            f"# {self.name}",
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
        lines = [f"base_model: {public_name(self.model)}"] if self.model else []
        library = "peft" if self.kind == "adapter" else "transformers"
        lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
        return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])

    def _about(self) -> str:
        origin = public_name(self.model) if self.model else f"a {FAMILIES[self.model_type].title}"
        quantized = "in full precision"
        if self.quant is not None:
            quantized = f"quantized to {self.quant.format}"
            if self.quant.calibration != PLAIN.name or self.quant.rules:
                quantized += f" with {CALIBRATIONS[self.quant.calibration].description}"
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

    def _use(self) -> str:
        if self.kind == "quantized":
            return _QUANTIZED.format(name=self.name)
        if self.kind == "merged" or self.config is None:
            return _python(_LOAD.format(name=self.name))
        if not self.folded and self.config.adapter.chosen.peft is None:
            note = "PEFT ignores tensors that it does not know, so its outputs would be wrong."
            return f"{_python(_LOAD_SCALARS.format(adapter=self.name))}\n\n{note} {self._warning()}"
        base, adapter = self.name, f"{self.name}/adapter"
        if self.kind == "adapter":
            base = public_name(self.base) if self.base else "FOLDER OF THE DEQUANTIZED BASE"
            adapter = self.name
        code = _python(_LOAD_ADAPTER.format(base=base, adapter=adapter))
        return f"{code}\n\n{self._warning()}"

    def _warning(self) -> str:
        if self.quant is None:
            return "The adapter works only with the weights named above."
        return (
            "The adapter works only with the dequantized weights, on which it was trained. "
            "`irqlora export --kind dequantized` writes them. The original weights, or another "
            "quantization of them (bitsandbytes' NF4 has no shifts), do not have the errors that "
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
        if field.name in ("train", "eval", "chat_template") and value:
            value = public_name(value)
        if value not in (None, "", ()):
            value = ", ".join(map(_word, value)) if isinstance(value, tuple) else value
            words.append(f"{field.name} {value}")
    return "; ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, QuantRule):
        changes = (f"{name} {change}" for name, change in value.overrides.items())
        return f"{value.match} ({' '.join(changes)})"
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
