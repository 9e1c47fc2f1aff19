"""The rows of the paper's tables: the printed figures, and the commands that make ours."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from irqlora_jax.config import Config, parse_config
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.quant.config import QuantConfig

FOLDER = Path(__file__).resolve().parent
CONFIGS = FOLDER.parents[1] / "configs" / "paper"
MMLU_COLUMNS = {
    "Humanities": "humanities",
    "STEM": "STEM",
    "Social": "social sciences",
    "Other": "other",
}
"""Columns, and their categories in `irqlora eval --task mmlu`."""
TASKS = {
    "HellaSwag": "hellaswag",
    "PIQA": "piqa",
    "WinoGrande": "winogrande",
    "ARC-e": "arc_easy",
    "ARC-c": "arc_challenge",
    "BoolQ": "boolq",
    "OBQA": "openbookqa",
}
"""Columns, and their tasks in lm-evaluation-harness."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A printed method as flags of `irqlora`."""

    quant: Mapping[str, Any]
    adapter: Mapping[str, Any] | None = None
    """None: not finetuned."""


_PLAIN, _ICQ = {"calibration": "none"}, {"calibration": "icq"}
_LORA, _IEC = {"method": "lora"}, {"method": "iec"}
METHODS = {
    "16-bit": Method({"format": "none", "calibration": "none"}),
    "NormalFloat": Method(_PLAIN),
    "ICQ without finetune": Method(_ICQ),
    "QLoRA": Method(_PLAIN, _LORA),
    "Vanilla": Method(_PLAIN, _LORA),
    "ICQ": Method(_ICQ, _LORA),
    "IEC (U1)": Method(_PLAIN, _IEC | {"iec.connections": "u1"}),
    "IEC (U2)": Method(_PLAIN, _IEC | {"iec.connections": "u2"}),
    "IEC": Method(_PLAIN, _IEC),
    "IR-QLoRA": Method(_ICQ, _IEC),
    "IR-QLoRA (QA-LoRA)": Method({"format": "int4", "block_size": 32} | _ICQ, _IEC),
}
"""Other printed methods are "not available here"."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A printed row."""

    size: str
    data: str
    """Data of the finetune; "-" without a finetune."""
    bits: int
    method: str
    figures: tuple[float, ...]
    notes: tuple[str, ...] = ()
    """Names of the table's notes that apply."""

    @property
    def quant(self) -> dict[str, Any]:
        """Fields of QuantConfig."""
        return {"format": f"nf{self.bits}"} | dict(METHODS[self.method].quant)

    @property
    def base(self) -> str:
        """Name of the quantized base. Rows share bases."""
        parts = [self.quant["format"], *(["icq"] if self.quant["calibration"] == "icq" else [])]
        return "-".join(parts).replace("none", "float")

    @property
    def name(self) -> str:
        """Name of the scored model. Equal rows of different tables have the same name."""
        adapter = METHODS[self.method].adapter
        if adapter is None:
            return self.base
        return "-".join([self.data, self.base, *adapter.values()])


@dataclasses.dataclass(frozen=True)
class Table:
    """A printed table."""

    number: int
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: Mapping[str, str]


@cache
def published() -> Mapping[str, Any]:
    """The content of published.yaml."""
    return yaml.safe_load((FOLDER / "published.yaml").read_text(encoding="utf-8"))


def tables() -> dict[int, Table]:
    """All tables by number."""
    found: dict[int, Table] = {}
    for number, content in published()["tables"].items():
        marks: dict[tuple, list[str]] = {}
        for note, *key in content.get("marks", []):
            marks.setdefault(tuple(key), []).append(note)

        def read(values: Sequence[Any], marks: Mapping = marks) -> Row:
            size, data, bits, method, *figures = values
            key = (size, method, data, bits)
            notes = [note for length in (2, 3, 4) for note in marks.get(key[:length], [])]
            return Row(size, data, bits, method, tuple(figures), tuple(notes))

        rows = [
            read(row)
            for other, methods in content.get("repeats", {}).items()
            for row in published()["tables"][other]["rows"]
            if row[3] in methods
        ]
        rows += map(read, content["rows"])
        columns, notes = tuple(content["columns"]), content.get("notes", {})
        found[number] = Table(number, content["title"], columns, tuple(rows), notes)
    return found


def architecture(size: str) -> LlamaConfig:
    """The architecture of a published size, such as 7b or llama2-7b."""
    values = {"model_type": "llama", "vocab_size": 32000, "hidden_act": "silu"}
    context = 4096 if size.startswith("llama2-") else 2048
    own = published()["sizes"][size.removeprefix("llama2-")]
    return LlamaConfig.from_dict(values | own | {"max_position_embeddings": context})


def size_of(llama: LlamaConfig) -> str | None:
    """The published size of an architecture, or None."""
    for size, own in published()["sizes"].items():
        if all(getattr(llama, name) == value for name, value in own.items()):
            return f"llama2-{size}" if llama.max_position_embeddings > 2048 else size
    return None


# -------------------------------------------------------------------------------------- commands


@dataclasses.dataclass(frozen=True)
class Asked:
    """Options that all rows share."""

    model: str
    output: Path
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Files or ids by the name of the data; without one, the recipe's data."""
    steps: int | None = None
    mmlu: str | None = None
    max_questions: int | None = None
    tasks: tuple[str, ...] = tuple(TASKS.values())
    task_folder: str | None = None
    flags: tuple[str, ...] = ()
    """Flags for `irqlora train`."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, and the file that exists when it is done."""

    argv: tuple[str, ...]
    done: Path
    needs: str = ""
    """A missing option."""

    @property
    def key(self) -> str:
        """Command and folder."""
        return f"{self.argv[0]} {self.done.parent.name}"


def stages(row: Row, table: Table, asked: Asked) -> list[Stage]:
    """The commands that make a row, in order."""
    method, base = METHODS[row.method], asked.output / "bases" / row.base
    quant = [f"--quant.{name}={value}" for name, value in row.quant.items()]
    argv = ["quantize", f"--model={asked.model}", f"--output_dir={base}", *quant]
    made = [Stage(tuple(argv), base / "base.safetensors")]
    folder = base
    if method.adapter is not None:
        folder = asked.output / "runs" / row.name
        made.append(_training(row, asked, base, folder))
    if table.number == 8:
        made.append(_harness(asked, folder))
    elif "STEM" in table.columns:
        argv = ["eval", f"--run={folder}", "--task=mmlu", f"--mmlu={asked.mmlu or 'FOLDER'}"]
        argv += _limit(asked)
        done, needs = folder / "eval-mmlu.json", "" if asked.mmlu else "--mmlu FOLDER"
        made.append(Stage((*argv, f"--output={done}"), done, needs))
    return made


def _training(row: Row, asked: Asked, base: Path, folder: Path) -> Stage:
    recipes = ["flan-v2" if row.data == "flan_v2" else "alpaca"]
    recipes += ["large"] if row.size in ("30b", "65b") else []
    argv = ["train", *(f"--config={os.path.relpath(CONFIGS)}/{name}.yaml" for name in recipes)]
    argv += [f"--model={base}", f"--output_dir={folder}"]
    argv += [f"--quant.{name}={value}" for name, value in row.quant.items()]
    adapter = METHODS[row.method].adapter or {}
    argv += [f"--adapter.{name}={value}" for name, value in adapter.items()]
    if row.data in asked.data:
        argv.append(f"--data.train={asked.data[row.data]}")
    if asked.steps is not None:
        argv.append(f"--train.steps={asked.steps}")
    missing = row.data == "flan_v2" and row.data not in asked.data
    needs = "--data flan_v2=FILE" if missing else ""
    return Stage((*argv, *asked.flags), folder / "results.json", needs)


def _harness(asked: Asked, folder: Path) -> Stage:
    argv = ["eval", f"--run={folder}", f"--task=lm-eval:{','.join(asked.tasks)}", "--shots=0"]
    if asked.task_folder is not None:
        argv.append(f"--task_folder={asked.task_folder}")
    done = folder / "eval-commonsense.json"
    return Stage((*argv, *_limit(asked), f"--output={done}"), done)


def _limit(asked: Asked) -> list[str]:
    return [] if asked.max_questions is None else [f"--limit={asked.max_questions}"]


def config_of(row: Row, table: Table, asked: Asked) -> Config | None:
    """The configuration of the finetune; None without a finetune."""
    found = [stage for stage in stages(row, table, asked) if stage.argv[0] == "train"]
    return parse_config(found[0].argv[1:]) if found else None


def quant_of(row: Row) -> QuantConfig:
    """The quantization of the base."""
    return QuantConfig(**row.quant)


# --------------------------------------------------------------------------------------- figures


def figures(row: Row, table: Table, asked: Asked) -> list[float | None] | None:
    """Our figures in the order of the columns; None if a command has not been run.

    Table 6 is computed from shapes, by `costs.storage`.
    """
    made = stages(row, table, asked)
    if not all(stage.done.is_file() for stage in made):
        return None
    if table.number == 7:
        return [_hours(made, asked)]
    scores = json.loads(made[-1].done.read_text(encoding="utf-8"))
    if table.number == 8:
        found: list[float | None] = [None] * (len(TASKS) + 1)
        for place, task in enumerate(TASKS.values()):
            own = [name for name in asked.tasks if name.endswith(task)]
            if own and "acc" in scores["scores"].get(own[0], {}):
                found[place] = 100 * scores["scores"][own[0]]["acc"]
        shown = [value for value in found if value is not None]
        found[-1] = sum(shown) / len(shown) if shown else None
        return found
    by_category = scores["by_category"]
    found = [by_category.get(category) for category in MMLU_COLUMNS.values()]
    found = [None if value is None else 100 * value for value in [*found, scores["accuracy"]]]
    if table.columns[-1] == "Entropy":
        file = made[0].done.with_name("quantization.json")
        survey = json.loads(file.read_text(encoding="utf-8"))
        found.append(survey.get("calibrated", survey["plain"])["mean_entropy"])
    return found


def _hours(made: Sequence[Stage], asked: Asked) -> float | None:
    """Hours of quantizing and of 10,000 steps, at the speed of the steps that were run."""
    seconds = times(asked.output)
    quantize, train = made
    if quantize.key not in seconds or train.key not in seconds:
        return None
    config = parse_config(train.argv[1:])
    return (seconds[quantize.key] + seconds[train.key] * 10_000 / config.train.steps) / 3600


def times(output: Path) -> dict[str, float]:
    """Seconds of each command, summed over all its starts."""
    file = output / "seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
