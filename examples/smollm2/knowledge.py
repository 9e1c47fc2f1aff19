"""Turns the commonsense files of LLM-Adapters into questions as lm-evaluation-harness asks them.

A row of these files is an instruction that lists its options and asks for "answer1" or "answer2".
A small model cannot follow that, so its score would be a guess. The harness instead compares the
probabilities of the answers' own texts after the question. `irqlora eval --task questions` scores
the result, by the rule of the harness's `acc` (tests/evaluate/test_harness.py compares the two).
Two tasks differ from the harness: BoolQ comes without its passage, because the files have none, and
WinoGrande's score includes the option itself, not only the words after it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TASKS = {
    "ARC-Easy": "ARC-easy",
    "ARC-Challenge": "ARC-challenge",
    "piqa": "PIQA",
    "boolq": "BoolQ",
    "openbookqa": "OpenBookQA",
    "winogrande": "WinoGrande",
}
"""Folders of the files, and the names of the tasks."""

_OPTION = re.compile(r"\s*\b(?:Answer|Solution|Option)(\d):\s*")
_FORMAT = re.compile(r"\s*Answer format: (\S+)\s*$")


def as_question(task: str, row: Mapping[str, str]) -> dict[str, Any]:
    """A row with the prompt and the choices of the harness.

    Args:
        task: the name of a task.
        row: "instruction" and "answer" of a file.

    Raises:
        ValueError: the instruction has another form.
    """
    text = row["instruction"]
    found = _FORMAT.search(text)
    _, colon, asked = text.partition(": ")
    if found is None or not colon or row["answer"] not in found[1].split("/"):
        raise ValueError(f"instruction = {text!r}: expected one that ends with its answer format")
    answer = found[1].split("/").index(row["answer"])
    asked = _FORMAT.sub("", asked)
    if task == "BoolQ":  # its options are the words true and false
        prompt, choices = f"Question: {asked}\nAnswer:", ["yes", "no"]
    else:
        stem, *parts = _OPTION.split(asked)
        choices = parts[1::2]
        if len(choices) != len(found[1].split("/")):
            raise ValueError(f"instruction = {text!r}: expected options such as Answer1: ...")
        prompt = stem if task == "OpenBookQA" else f"Question: {stem}\nAnswer:"
    if task == "WinoGrande":  # the sentence up to the blank; the choices are its possible ends
        prompt, _, end = stem.partition("_")
        choices = [f"{choice}{end}" for choice in choices]
    return {"subject": task, "prompt": prompt, "choices": choices, "answer": answer}


def write_questions(folder: Path, limit: int, file: Path) -> None:
    """Writes the first `limit` questions of each task as a file for `irqlora eval`.

    Raises:
        FileNotFoundError: the folder has not all files TASK/test.json.
    """
    rows = []
    for name, task in TASKS.items():
        source = json.loads((folder / name / "test.json").read_text(encoding="utf-8"))
        rows += [as_question(task, row) for row in source[:limit]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
