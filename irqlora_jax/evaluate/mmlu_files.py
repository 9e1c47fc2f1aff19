"""Reads the files of MMLU and writes its prompts."""

import csv
import dataclasses
import hashlib
import io
from collections.abc import Collection, Sequence
from pathlib import Path

from irqlora_jax.text import decode_text, shorten

LETTERS = "ABCD"
CATEGORIES = {
    "STEM": ("physics", "chemistry", "biology", "computer science", "math", "engineering"),
    "humanities": ("history", "philosophy", "law"),
    "social sciences": ("politics", "culture", "economics", "geography", "psychology"),
    "other": ("other", "business", "health"),
}
"""Subcategories of each category."""
SUBCATEGORIES = {
    name: tuple(subjects.split())
    for name, subjects in {
        "physics": "astronomy college_physics conceptual_physics high_school_physics",
        "chemistry": "college_chemistry high_school_chemistry",
        "biology": "college_biology high_school_biology",
        "computer science": "college_computer_science computer_security "
        "high_school_computer_science machine_learning",
        "math": "abstract_algebra college_mathematics elementary_mathematics "
        "high_school_mathematics high_school_statistics",
        "engineering": "electrical_engineering",
        "history": "high_school_european_history high_school_us_history "
        "high_school_world_history prehistory",
        "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy "
        "world_religions",
        "law": "international_law jurisprudence professional_law",
        "politics": "high_school_government_and_politics public_relations security_studies "
        "us_foreign_policy",
        "culture": "human_sexuality sociology",
        "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
        "geography": "high_school_geography",
        "psychology": "high_school_psychology professional_psychology",
        "other": "global_facts miscellaneous professional_accounting",
        "business": "business_ethics management marketing",
        "health": "anatomy clinical_knowledge college_medicine human_aging medical_genetics "
        "nutrition professional_medicine virology",
    }.items()
}
"""Subjects of each subcategory."""
_COLUMNS = 2 + len(LETTERS)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The contents of the files of a subject."""

    name: str
    examples: list[list[str]]
    rows: list[list[str]]
    digest: str
    """SHA-256 of the bytes of the two files."""


def find_subjects(folder: Path, split: str, wanted: Collection[str]) -> list[str]:
    """Returns the sorted names of the subjects with a file, or only the wanted ones if given.

    Raises:
        FileNotFoundError: there are no subjects, or a wanted one is missing.
    """
    ending = f"_{split}.csv"
    if not (folder / split).is_dir():
        raise FileNotFoundError(
            f"mmlu = '{folder}': no folder {split} there; expected a folder with "
            f"dev/SUBJECT_dev.csv and {split}/SUBJECT{ending}"
        )
    found = sorted(f.name.removesuffix(ending) for f in (folder / split).glob(f"*{ending}"))
    if not found:
        raise FileNotFoundError(f"{folder / split}: no files SUBJECT{ending} there")
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise FileNotFoundError(
            f"subjects: {folder / split} has no {missing[0]}{ending}; it has {', '.join(found)}"
        )
    return [name for name in found if not wanted or name in wanted]


def read_subject(folder: Path, name: str, split: str, shots: int, limit: int | None) -> Subject:
    """Reads the first `shots` examples and `limit` questions of a subject.

    Raises:
        FileNotFoundError, ValueError: a missing or malformed file.
    """
    asked = folder / split / f"{name}_{split}.csv"
    data = asked.read_bytes()
    rows = _read_rows(asked, data)[:limit]
    examples: list[list[str]] = []
    if shots > 0:
        shown = folder / "dev" / f"{name}_dev.csv"
        if not shown.is_file():
            raise FileNotFoundError(f"{shown}: no such file; shots = 0 needs none")
        more = shown.read_bytes()
        examples = _read_rows(shown, more)
        if len(examples) < shots:
            raise ValueError(f"shots = {shots}: {shown} has {len(examples)} examples")
        data += more
    return Subject(name, examples[:shots], rows, hashlib.sha256(data).hexdigest())


def _read_rows(path: Path, data: bytes) -> list[list[str]]:
    text = io.StringIO(decode_text(data, path), newline="")
    try:
        rows = list(csv.reader(text, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from None
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows, 1):
        if len(row) != _COLUMNS:
            accepted = "question, A, B, C, D, answer"
            raise ValueError(f"{path}, row {number} has {len(row)} columns: expected {accepted}")
        if len(row[-1]) != 1 or row[-1] not in LETTERS:
            raise ValueError(
                f"{path}, row {number}: answer = {shorten(row[-1])}: expected A, B, C or D"
            )
    return rows


def prompt_text(subject: str, examples: Sequence[Sequence[str]], row: Sequence[str]) -> str:
    """Writes the prompt of a question, with its examples in front."""
    # The published prompts have two spaces before the subject.
    head = "The following are multiple choice questions (with answers) about  "
    shown = "".join(f"{_question(example)} {example[-1]}\n\n" for example in examples)
    return f"{head}{subject.replace('_', ' ')}.\n\n{shown}{_question(row)}"


def _question(row: Sequence[str]) -> str:
    choices = (f"\n{letter}. {text}" for letter, text in zip(LETTERS, row[1:-1], strict=True))
    return f"{row[0]}{''.join(choices)}\nAnswer:"
