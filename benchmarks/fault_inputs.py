"""A tiny model with its data, and what a folder holds, for `faults.py` and `tests/faults`."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.models import byte_tokenizer, tiny_llama, write_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA = tiny_llama(vocab_size=260, max_position_embeddings=128)
# Measured times and memory, which differ from run to run, and the checksum of results with them.
_SPEEDS = {"tokens_per_second", "eval_tokens_per_second", "device_share", "peak_memory"}
TIMES = _SPEEDS | {"seconds", "eval_seconds", "started", "checksum", "directory"}


def write_inputs(folder: Path) -> Path:
    """Writes FOLDER/model, train.jsonl, text.txt, prompts.txt and mmlu/."""
    if (folder / "mmlu").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(template=TEMPLATE)
    model = write_model(folder / "model", LLAMA, tokenizer=tokenizer)
    (model / "generation_config.json").write_text('{"eos_token_id": [1]}\n')
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "seven", "eight", "nine", "a", "the"]

    def say(count: int) -> str:
        return " ".join(words[i] for i in rng.integers(0, len(words), count))

    rows = [
        {"input": say(3), "output": say(2), "messages": [
            {"role": "user", "content": say(3)}, {"role": "assistant", "content": say(2)}]}
        for _ in range(24)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text(say(150))
    (folder / "prompts.txt").write_text("".join(say(3) + "\n" for _ in range(6)))
    for split, count in (("dev", 2), ("test", 6)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "astronomy", "virology", "marketing"):
            lines = [",".join([say(3), *"wxyz", "ABCD"[i % 4]]) for i in range(count)]
            (folder / "mmlu" / split / f"{subject}_{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def train_flags(inputs: Path, steps: int, /, **changes: Any) -> list[str]:
    """A short run in the folder "run" of the working directory."""
    settings = {
        "model": inputs / "model",
        "output_dir": "run",
        "quant.format": "nf4",
        "quant.calibration": "none",
        "adapter.rank": 4,
        "adapter.dropout": 0.1,
        "data.train": inputs / "train.jsonl",
        "data.format": "chat",
        "data.eval_fraction": 0.25,
        "train.steps": steps,
        "train.batch_size": 4,
        "train.learning_rate": 1e-3,
        "train.save_every": 2,
        "train.eval_every": 2,
        "mesh.data": 1,
        "log.every": 1,
        "log.progress": "false",
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return ["train", *(f"--{name}={value}" for name, value in settings.items())]


def files_of(folder: Path) -> list[str]:
    """Relative paths of all files and links, sorted."""
    found = (Path(top, name) for top, _, names in os.walk(folder) for name in names)
    return sorted(str(path.relative_to(folder)) for path in found)


def bytes_of(folder: Path) -> dict[str, str]:
    """The hash of every file by its path."""
    digests = {}
    for name in files_of(folder):
        path = folder / name
        data = path.read_bytes() if path.is_file() else b"no file"
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def without_times(value: Any) -> Any:
    """JSON without the measured times."""
    if isinstance(value, Mapping):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def trained(run: Path) -> dict[str, Any]:
    """The result of a training: checksums of all arrays of every checkpoint, losses, scores."""
    found: dict[str, Any] = {}
    for file in sorted((run / "checkpoints").glob("*/_CHECKPOINT_METADATA")):
        if file.parent.name.isdecimal():
            own = json.loads(file.read_text())["custom_metadata"]
            found[file.parent.name] = own["arrays"], own.get("eval_loss")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [without_times(json.loads(line)) for line in lines]
    found["results"] = without_times(json.loads((run / "results.json").read_text()))
    return found
