"""Wrong input for every reader of the package, from fixed seeds."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_inputs import LLAMA
from benchmarks.fault_worker import Answer, attempt

# ----------------------------------------------------------------------------------------- changes

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", " ", "text", "\u2028", "\x00", "\ud800", "\U0001f600", "a" * 5000, [], {},
    [None], [[]], {"": None}, [1, "a"], {"a": {"b": []}}, "1", "null", "-inf", "../..", "/", "~",
)  # fmt: skip
_BYTES = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"{", b"]", b",", b"\xe2\x80\xa8")
_TEXTS = (b"1e999", b"-1", b"NaN", b"null", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\\ud800")


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes of bytes."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + data[place + rng.choice((1, 2, 16, 200)) :]
        elif kind == 2:
            data = data[:place] + rng.randbytes(rng.choice((1, 4, 50))) + data[place:]
        elif kind == 3:
            data = data[:place] + rng.choice(_BYTES + _TEXTS) + data[place:]
        elif kind == 4 and data:
            place = min(place, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        elif kind == 5:
            end = place + rng.choice((1, 10, 100))
            data = data[:end] + data[place:end] * rng.choice((1, 50)) + data[end:]
    return data


def change_value(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, removed or added."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        value = dict(value) if isinstance(value, dict) else list(value)
        kind = rng.randrange(10)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice(("new", "", "a.b", "\u2028"))] = rng.choice(_VALUES)
        elif kind == 2 and isinstance(value, list):
            value.extend(value[:3] * rng.choice((1, 20)))
        else:
            value[key] = change_value(value[key], rng)
        return value
    if isinstance(value, str) and rng.random() < 0.5:
        return change_bytes(value.encode(errors="replace"), rng).decode(errors="replace")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.3:
        return value * rng.choice((-1, 0, 1000, 0.1)) + rng.choice((0, 1, 0.5))
    return rng.choice(_VALUES)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Changes a value of JSON or of JSON lines, or the bytes."""
    if rng.random() < 0.3:
        return change_bytes(data, rng)
    text = data.decode()
    try:
        return json.dumps(change_value(json.loads(text), rng)).encode()
    except ValueError:
        lines = [line for line in text.split("\n") if line]
        place = rng.randrange(len(lines))
        try:
            lines[place] = json.dumps(change_value(json.loads(lines[place]), rng))
        except ValueError:
            return change_bytes(data, rng)
        return ("\n".join(lines) + "\n").encode()


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes the header of a safetensors file, and sometimes its length, or any bytes."""
    if rng.random() < 0.3:
        return change_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + size], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(data)))
    return length.to_bytes(8, "little") + header + data[8 + size :]


# ----------------------------------------------------------------------------------------- readers


@dataclasses.dataclass(frozen=True)
class Target:
    """A file that is changed, and the reader of the folder that contains it.

    Attributes:
        files: paths of the files that may be changed, or patterns.
        change: of the bytes.
        read: called with the folder and the changed file.
    """

    files: tuple[str, ...]
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, Path], Any]


def _model() -> Any:
    from irqlora_jax.adapters.config import AdapterConfig
    from irqlora_jax.model.llama import Llama

    return Llama(LLAMA, adapter=AdapterConfig(rank=4))


def _configuration(folder: Path, file: Path) -> Any:
    from irqlora_jax.config import TrainOptions, parse_flags

    return parse_flags(TrainOptions, ["--config", str(file)], "irqlora train").config()


def _flags(folder: Path, file: Path) -> Any:
    from irqlora_jax.config import TrainOptions, parse_flags
    from irqlora_jax.evaluate.tasks import EvalConfig

    lines = file.read_bytes().decode(errors="surrogateescape").split("\n")
    kind = EvalConfig if any(line.startswith("--task") for line in lines) else TrainOptions
    return parse_flags(kind, [line for line in lines if line], "irqlora")


def _rows(format: str) -> Callable[[Path, Path], Any]:
    def read(folder: Path, file: Path) -> Any:
        from irqlora_jax.data import load_examples
        from irqlora_jax.data.config import DataConfig
        from irqlora_jax.files.hub import load_tokenizer

        config: Any = DataConfig(format=format)  # type: ignore[arg-type]
        template = folder / "template.jinja"
        if template.is_file():
            config = dataclasses.replace(config, chat_template=str(template))
        tokenizer = load_tokenizer(folder.parent / "plain" / "model")
        return load_examples(str(file), config, tokenizer, 128)

    return read


def _weights(folder: Path, file: Path) -> Any:
    from irqlora_jax.base.make import load_base

    return load_base(folder, None)


def _architecture(folder: Path, file: Path) -> Any:
    from irqlora_jax.files.hub import read_config

    return read_config(folder)


def _tokenizer(folder: Path, file: Path) -> Any:
    from irqlora_jax.data.encode import encode_pairs
    from irqlora_jax.files.hub import load_tokenizer
    from irqlora_jax.runs.load import with_end_tokens

    tokenizer = load_tokenizer(folder)
    with_end_tokens(LLAMA, tokenizer, folder)
    return encode_pairs(tokenizer, ["a question"], ["an answer"], join=True)


def _adapter(folder: Path, file: Path) -> Any:
    from irqlora_jax.export.peft import load_adapter

    return load_adapter(folder, _model())


def _run(folder: Path, file: Path) -> Any:
    from irqlora_jax.generate.conversation import encode_turns, find_style
    from irqlora_jax.runs.load import load_run

    run = load_run(folder)
    return encode_turns(find_style(run.config, run.tokenizer), run.tokenizer, "a question")


def _page(folder: Path, file: Path) -> Any:
    from irqlora_jax.report.write import ReportConfig, report

    return report(ReportConfig(str(folder), str(folder / "page.html")))


def _mmlu(folder: Path, file: Path) -> Any:
    from irqlora_jax.evaluate.mmlu_files import find_subjects, read_subject

    names = find_subjects(folder, "test", ())
    return [read_subject(folder, name, "test", 2, None) for name in names]


def _questions(folder: Path, file: Path) -> Any:
    from irqlora_jax.evaluate.questions import load_questions
    from irqlora_jax.files.hub import load_tokenizer

    return load_questions(str(file), load_tokenizer(folder.parent / "plain" / "model"))


def _prompts(folder: Path, file: Path) -> Any:
    from irqlora_jax.evaluate.prompts import read_prompts

    return read_prompts(str(file))


def _text(folder: Path, file: Path) -> Any:
    from irqlora_jax.text import read_text

    return read_text(file)


_ROWS = {
    "alpaca": {"instruction": "Say it.", "input": "this", "output": "that"},
    "input_output": {"input": "this", "output": "that"},
    "self_instruct": {"prompt": "this", "completion": "that"},
    "flan_v2": {"inputs": "this", "targets": "that"},
    "chip2": {"text": "<human>: this\n<bot>: that"},
    "hh_rlhf": {"chosen": "\n\nHuman: this\n\nAssistant: that"},
    "oasst1": {"text": "### Human: this### Assistant: that"},
    "text": {"text": "this and that and more"},
    "chat": {
        "messages": [
            {"role": "user", "content": "this"},
            {"role": "assistant", "content": "that", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
}
_MORE = {
    "sharegpt": ("chat", {"conversations": [{"from": "human", "value": "this"},
                                            {"from": "gpt", "value": "that"}]}),
    "trees": ("oasst1", {"message_id": "1", "parent_id": None, "text": "this", "role": "prompter",
                         "rank": 0, "deleted": False}),
}  # fmt: skip
FORMATS = {name: (name, row) for name, row in _ROWS.items()} | _MORE


def _text_tables() -> dict[str, tuple[str, ...]]:
    flat = [name for name, (_, row) in FORMATS.items() if all(type(v) is str for v in row.values())]
    return {
        name: tuple(
            f"{name}.{suffix}"
            for suffix in ("jsonl", "json", "parquet", *(("csv", "tsv") if name in flat else ()))
        )
        for name in FORMATS
    }


_DATA_FILES = _text_tables()
_RUN_FILES = (
    "run/*.json", "run/*.safetensors", "run/metrics.jsonl", "run/tokenizer/*",
    "run/checkpoints/*/*", "run/checkpoints/*/default/*", "run/checkpoints/*/default/*/*/*",
)  # fmt: skip


def _by_suffix(data: bytes, rng: random.Random) -> bytes:
    return change_json(data, rng) if data[:1] in (b"{", b"[") else change_bytes(data, rng)


def _of_run(data: bytes, rng: random.Random) -> bytes:
    return change_safetensors(data, rng) if data[8:9] == b"{" else _by_suffix(data, rng)


def targets() -> dict[str, Target]:
    """Every kind of input, by name."""
    data = {
        f"data {name}": Target(_DATA_FILES[name], _by_suffix, _rows(FORMATS[name][0]))
        for name in FORMATS
    }
    return {
        "configuration": Target(("run.yaml", "run.json"), _by_suffix, _configuration),
        "flags": Target(("train.flags", "eval.flags"), change_bytes, _flags),
        **data,
        "data txt": Target(("text.txt",), change_bytes, _rows("text")),
        "chat template": Target(
            ("template.jinja",), change_bytes, lambda d, f: _rows("chat")(d, d / "chat.jsonl")
        ),
        "safetensors": Target(("model/*.safetensors",), change_safetensors, _within(_weights)),
        "index": Target(("model/*.index.json",), change_json, _within(_weights)),
        "config.json": Target(("model/config.json",), change_json, _within(_architecture)),
        "tokenizer": Target(
            ("model/token*", "model/*.jinja", "model/gen*"), _by_suffix, _within(_tokenizer)
        ),
        "adapter": Target(("adapter/adapter_*",), _of_run, _within(_adapter)),
        "run": Target(_RUN_FILES, _of_run, lambda d, f: _run(d / "run", f)),
        "report": Target(_RUN_FILES, _of_run, lambda d, f: _page(d / "run", f)),
        "MMLU": Target(("mmlu/*/*.csv",), change_bytes, lambda d, f: _mmlu(d / "mmlu", f)),
        "questions": Target(("questions.jsonl", "questions.json"), _by_suffix, _questions),
        "prompts": Target(("prompts.txt", "prompts.jsonl"), _by_suffix, _prompts),
        "perplexity": Target(("text.txt",), change_bytes, _text),
    }


def _within(read: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    return lambda folder, file: read(file.parent, file)


def write_originals(folder: Path, inputs: Path, run: Path) -> Answer:
    """Writes FOLDER/plain with a correct file of every kind."""
    import pyarrow
    import pyarrow.parquet

    from benchmarks.fault_worker import command
    from tests.models import random_tensors, write_model

    plain = folder / "plain"
    plain.mkdir(parents=True)
    shutil.copytree(inputs / "model", plain / "model")
    (plain / "model" / "model.safetensors").unlink()
    write_model(plain / "model", LLAMA, random_tensors(LLAMA), shards=2)
    (plain / "model" / "generation_config.json").write_text('{"eos_token_id": [1]}\n')
    shutil.copytree(inputs / "mmlu", plain / "mmlu")
    shutil.copytree(run, plain / "run")
    answer = command("export", f"--run={run}", f"--output_dir={plain / 'adapter'}",
                     "--kind=adapter", "--progress=false")  # fmt: skip
    for name, (_, row) in FORMATS.items():
        rows = [row, {**row}]
        if name == "trees":
            rows[1] = row | {"message_id": "2", "parent_id": "1", "role": "assistant"}
        (plain / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (plain / f"{name}.json").write_text(json.dumps(rows))
        for suffix, mark in (("csv", ","), ("tsv", "\t")):
            lines = [row.keys(), *(r.values() for r in rows)]
            quoted = ['"' + str(v).replace('"', '""') + '"' for line in lines for v in line]
            width = len(row)
            parts = [mark.join(quoted[i : i + width]) for i in range(0, len(quoted), width)]
            (plain / f"{name}.{suffix}").write_text("\n".join(parts) + "\n")
        stored = [{k: json.dumps(v) if k == "tools" else v for k, v in r.items()} for r in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored), plain / f"{name}.parquet")
    shutil.copyfile(inputs / "text.txt", plain / "text.txt")
    shutil.copyfile(inputs / "prompts.txt", plain / "prompts.txt")
    (plain / "template.jinja").write_text((inputs / "model" / "chat_template.jinja").read_text())
    (plain / "prompts.jsonl").write_text('{"prompt": "a"}\n{"instruction": "b", "input": "c"}\n')
    question = {"subject": "s", "prompt": "The sky is", "choices": ["blue", "red"], "answer": 0}
    (plain / "questions.jsonl").write_text(json.dumps(question) + "\n" + json.dumps(question))
    options = {"instruction": "Is it? Answer format: true/false", "output": "it is true"}
    (plain / "questions.json").write_text(json.dumps([options | {"answer": "true"}]))
    settings = {
        "model": "m", "output_dir": "o", "seed": 1, "quant": {"format": "nf3", "rules": [
            {"match": "layers.0.*", "format": "nf4"}]}, "adapter": {"method": "iec", "rank": 8},
        "data": {"train": "d.jsonl", "eval_fraction": 0.1}, "train": {"steps": 5, "beta1": 0.9},
        "mesh": {"data": 1}, "evaluate": {"samples": ["a", "b"]}, "log": {"every": 1},
    }  # fmt: skip
    (plain / "run.json").write_text(json.dumps(settings))
    import yaml

    (plain / "run.yaml").write_text(yaml.safe_dump(settings))
    flags = ["--model=m", "--output_dir=o", "--train.steps=5", "--quant.format=nf3", "--seed", "3"]
    (plain / "train.flags").write_text("\n".join(flags))
    flags = ["--run=r", "--task=mmlu", "--limit=3", "--shots", "2", '--subjects=["a","b"]']
    (plain / "eval.flags").write_text("\n".join(flags))
    return answer


def run_input(originals: Path, scratch: Path, name: str, seed: int) -> Answer:
    """Changes a file of one kind with a seed, and reads it.

    The answer's value is the name of the changed file.
    """
    rng = random.Random(f"{name} {seed}")
    target = targets()[name]
    plain = originals / "plain"
    files = sorted(file for each in target.files for file in plain.glob(each) if file.is_file())
    file = rng.choice(files).relative_to(plain)
    # The reader sees a folder with links to the correct files beside the changed one.
    folder = scratch / "plain"
    shutil.rmtree(folder, ignore_errors=True)
    top = file.parts[0]
    folder.mkdir()
    for path in plain.iterdir():
        if path.name == top and path.is_dir():
            shutil.copytree(path, folder / top)
        else:
            (folder / path.name).symlink_to(path)
    if (folder / file).is_symlink():
        (folder / file).unlink()
    if name != "chat template" and name != "data chat":
        (folder / "template.jinja").unlink(missing_ok=True)
    (folder / file).write_bytes(target.change((plain / file).read_bytes(), rng))
    answer = attempt(_dropped(target.read), folder, folder / file)
    return dataclasses.replace(answer, value=str(file))


def _dropped(read: Callable[[Path, Path], Any]) -> Callable[[Path, Path], None]:
    """Reads and drops the result, which need not go through a pipe."""

    def call(folder: Path, file: Path) -> None:
        read(folder, file)

    return call
