"""Damages every file of a run and of a base, and looks at what the commands make of it."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.fault_inputs import bytes_of, train_flags, trained, without_times
from benchmarks.fault_worker import Answer, command


def _flip(where: float) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        data = bytearray(file.read_bytes())
        if data:
            data[round(where * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return change


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def _nulls(file: Path) -> None:
    lines = file.read_text().split("\n") if file.suffix == ".jsonl" else [file.read_text()]
    values = [json.loads(line) for line in lines if line.strip()]
    rows = [dict.fromkeys(value) if isinstance(value, dict) else [None] for value in values]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte flipped": _flip(0),
    "middle byte flipped": _flip(0.5),
    "last byte flipped": _flip(1),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
    "a folder": _folder,
    "garbage": lambda file: file.write_bytes(bytes(range(256))),
    "no JSON": lambda file: file.write_text('{"a": [1,\n'),
    "other JSON": lambda file: file.write_text("[3]\n"),
    "nulls": _nulls,
    "link to nowhere": _link,
}


def damages_of(file: Path) -> list[str]:
    """The damages that fit to a file. An evaluation that is deleted is not missed."""
    left_out = {"nulls"} if file.suffix not in (".json", ".jsonl") else set()
    left_out |= {"deleted"} if file.name.startswith("eval-") else set()
    return [damage for damage in DAMAGES if damage not in left_out]


def _half(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files[::2]:
        file.unlink()


def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file\n")


FOLDER_DAMAGES: dict[str, Callable[[Path], object]] = {
    "half deleted": _half,
    "deleted": shutil.rmtree,
    "a file": _file,
}


@dataclasses.dataclass(frozen=True)
class Use:
    """A command for a run or a base in the working directory, and its result as a value."""

    argv: tuple[str, ...]
    result: Callable[[Path], Any]


def _json(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = without_times(json.loads((folder / name).read_text()))
        return {k: v for k, v in found.items() if k not in ("settings", "versions")}

    return read


def uses_of_run(inputs: Path, steps: int) -> dict[str, Use]:
    """Commands for the folder "run"; `train` goes on up to `steps`."""
    out = ("--output", "out.json")
    run = ("--run", "run", "--progress=false")
    ask = ("eval", *run, *out, "--task")
    export = ("export", *run, "--output_dir", "exported", "--kind")
    return {
        "train": Use(tuple(train_flags(inputs, steps)), lambda folder: trained(folder / "run")),
        "eval": Use((*ask, "perplexity", f"--text={inputs}/text.txt"), _json("out.json")),
        "eval best": Use(
            (*ask, "perplexity", f"--text={inputs}/text.txt", "--checkpoint=best"),
            _json("out.json"),
        ),
        "generate": Use(
            (*ask, "generate", "--prompt=red green", "--max_new_tokens=8"), _json("out.json")
        ),
        "export adapter": Use((*export, "adapter"), lambda folder: bytes_of(folder / "exported")),
        "export merged": Use((*export, "merged"), lambda folder: bytes_of(folder / "exported")),
        "report": Use(
            ("report", "--run=run", "--output=out.html"),
            lambda folder: (folder / "out.html").read_text(),
        ),
    }


def uses_of_base(inputs: Path) -> dict[str, Use]:
    """Commands for the folder "base" of `irqlora quantize`."""
    flags = train_flags(inputs, 2, model="base")
    ask = ("eval", "--run=base", "--progress=false", "--output=out.json", "--task")
    return {
        "train": Use(tuple(flags), lambda folder: trained(folder / "run")),
        "eval": Use((*ask, "perplexity", f"--text={inputs}/text.txt"), _json("out.json")),
        "export merged": Use(
            ("export", "--run=base", "--progress=false", "--output_dir=exported"),
            lambda folder: bytes_of(folder / "exported"),
        ),
        "report": Use(
            ("report", "--run=base", "--output=out.html"),
            lambda folder: (folder / "out.html").read_text(),
        ),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """One damage of one file or folder, and the command that meets it."""

    target: str
    damage: str
    use: str

    def __str__(self) -> str:
        return f"{self.target}: {self.damage}: {self.use}"


def cases(folder: Path, uses: Mapping[str, Use]) -> Iterator[Case]:
    """Every damage of every file and folder in `folder`, for every use."""
    for path in sorted(folder.rglob("*")):
        target = str(path.relative_to(folder))
        for damage in FOLDER_DAMAGES if path.is_dir() else damages_of(path):
            for use in uses:
                yield Case(target, damage, use)


def uses_of(inputs: Path) -> dict[str, dict[str, Use]]:
    """Commands for the folders "run" (4 steps done) and "base", by name."""
    return {"run": uses_of_run(inputs, 6), "base": uses_of_base(inputs)}


OUTPUTS = frozenset(("run", "base", "out.json", "out.html", "exported"))


def reference(inputs: Path, folder: Path, damaged: str, name: str) -> Any:
    """The result of a use of an undamaged run or base in `folder`, the working directory.

    Raises:
        RuntimeError: the command fails.
    """
    use = uses_of(inputs)[damaged][name]
    answer = command(*use.argv)
    if answer.kind != "done":
        raise RuntimeError(f"{use.argv}: {answer.error}")
    return use.result(folder)


def judge(
    inputs: Path, scratch: Path, damaged: str, case: Case, expected: Any
) -> tuple[str, Answer]:
    """Damages a file in SCRATCH/DAMAGED, runs the command in SCRATCH and names the outcome.

    Outcomes:
        refused: one sentence names the file or folder, and every other file is as it was.
        harmless: the result is bit by bit the undamaged one.
        said: the result is another one, and a message names the file.
        UNNAMED, LOST, SILENT, TRACEBACK, OUTSIDE: faults (`HANG` is up to the caller).
    """
    use, target = uses_of(inputs)[damaged][case.use], scratch / damaged / case.target
    kinds = FOLDER_DAMAGES if target.is_dir() else DAMAGES
    before = bytes_of(scratch / damaged)
    kinds[case.damage](target)
    after_damage = bytes_of(scratch / damaged)
    if before == after_damage and target.exists():
        return "same bytes", Answer("done")
    answer = command(*use.argv)
    if any(path.name not in OUTPUTS for path in scratch.iterdir()):
        return "OUTSIDE", answer
    if answer.kind == "traceback":
        return "TRACEBACK", answer
    if answer.kind == "refused":
        if bytes_of(scratch / damaged) != after_damage:
            return "LOST", answer
        named = _names(answer.error, case.target)
        return ("refused" if named and answer.is_sentence else "UNNAMED"), answer
    try:
        found = use.result(scratch)
    except (OSError, ValueError) as error:
        return "SILENT", dataclasses.replace(answer, error=repr(error))
    if found == expected:
        return "harmless", answer
    return ("said" if _names(answer.said, case.target) else "SILENT"), answer


def _names(text: str, target: str) -> bool:
    """Whether a message names the file, or inside of a checkpoint the checkpoint's folder."""
    parts = Path(target).parts
    wanted = Path(*parts[:2]) if parts[0] == "checkpoints" and len(parts) > 1 else target
    return str(wanted) in text or (parts[0] == "tokenizer" and "/tokenizer" in text)
