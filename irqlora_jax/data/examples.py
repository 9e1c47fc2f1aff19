"""Files and hub data sets to examples: tokens, and which of them are to be learned."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from irqlora_jax.config import DataConfig

SUFFIXES = (".json", ".jsonl", ".txt")
DOCUMENT_END = "<|endoftext|>"
# Stanford Alpaca's two prompts (train.py of tatsu-lab/stanford_alpaca).
_REQUEST = "Write a response that appropriately completes the request.\n\n"
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    f"context. {_REQUEST}### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:"
)
_WITHOUT_INPUT = (
    f"Below is an instruction that describes a task. {_REQUEST}"
    "### Instruction:\n%s\n\n### Response:"
)
_COLUMNS = {
    "alpaca": ("instruction", "output"),
    "input_output": ("input", "output"),
    "text": ("text",),
}
_log = logging.getLogger(__name__)


class Example(NamedTuple):
    """Tokens of one sequence; where `targets` is true, the token is to be predicted."""

    tokens: Int32[np.ndarray, " seq"]
    targets: Bool[np.ndarray, " seq"]


class Row(NamedTuple):
    """One object of a file, and its place there for messages ("FILE, line 3")."""

    place: str
    columns: dict[str, Any]

    def text(self, name: str, default: str | None = None) -> str:
        """The text of a column; the default, if there is one, where it is absent or null.

        Raises:
            ValueError: not text.
        """
        value = self.columns.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise ValueError(f"{self.place}: {name} = {value!r}: accepted is text")
        return value


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Stanford Alpaca's prompt; `context` is what its files call the input."""
    return _WITH_INPUT % (instruction, context) if context else _WITHOUT_INPUT % instruction


def load_examples(source: str, config: DataConfig, tokenizer: Any) -> list[Example]:
    """Reads and tokenizes a data set.

    Rows of prompt and answer: the prompt is cut on the left to `source_length` (its first token,
    bos, stays), the answer with its eos on the right to `target_length`; how many were cut is
    logged. Prompt and answer are tokenized apart, so that the mask is exact.

    Plain text: each document (a row, or in a .txt file what stands between lines
    `<|endoftext|>`) gets bos and eos; all are joined and cut into windows of `sequence_length`, of
    which every token but the first is learned.

    Args:
        source: a .json file (a list of objects, or an object that has such a list as "data"), a
            .jsonl file (an object on each line), a .txt file, or, where there is no such file, the
            id of a data set on the hub, of which the split "train" is read.
        config: the format, the lengths and `max_examples` (rows; for plain text windows).
        tokenizer: of transformers; bos and eos are used where it has them.

    Raises:
        FileNotFoundError: neither a file nor a data set that the hub gives.
        ValueError: what is there is no data of this format; says which row and why.
    """
    limit = config.max_examples
    if config.format == "text":
        return _windows(source, config.sequence_length, tokenizer)[:limit]
    rows = read_rows(source, _COLUMNS[config.format])[:limit]
    if config.format == "alpaca":
        prompts = [alpaca_prompt(r.text("instruction"), r.text("input", "")) for r in rows]
    else:
        prompts = [row.text("input") for row in rows]
    answers = [row.text("output") for row in rows]
    pairs = encode_pairs(tokenizer, prompts, answers, join=config.format == "input_output")

    examples, cut, blank = [], 0, 0
    head = len(prefix_tokens(tokenizer))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        blank += not answer
        answer = answer + end
        if not answer:
            raise ValueError(f"{row.place}: output = {row.text('output')!r} has no tokens")
        # A tokenizer without bos gives no context at all to the answer of an empty prompt.
        if not prompt:
            raise ValueError(f"{row.place}: the prompt has no tokens")
        cut += len(prompt) > config.source_length or len(answer) > config.target_length
        over = max(0, len(prompt) - config.source_length)
        prompt = prompt[:head] + prompt[head + over :]
        answer = answer[: config.target_length]
        learned = [config.train_on_source] * len(prompt) + [True] * len(answer)
        learned[0] = False  # nothing stands in front of it
        examples.append(Example(np.array(prompt + answer, np.int32), np.array(learned)))
    if cut:
        _log.warning(
            "%s: %d of %d rows were cut to data.source_length = %d or data.target_length = %d",
            *(source, cut, len(rows), config.source_length, config.target_length),
        )
    if blank:
        _log.warning("%s: %d of %d rows have an empty answer", source, blank, len(rows))
    return examples


def read_rows(source: str, columns: Sequence[str]) -> list[Row]:
    """The objects of a .json or .jsonl file or of a hub data set, each with these columns.

    Raises:
        FileNotFoundError: neither a file nor a data set that the hub gives.
        ValueError: not readable, no rows, or a row without one of the columns.
    """
    path = _local(source)
    if path is None:
        rows = _hub_rows(source)
    elif path.suffix == ".json":
        rows = _json_rows(path)
    elif path.suffix == ".jsonl":
        rows = _jsonl_rows(path)
    else:
        raise ValueError(f"{source}: a file of rows is .json or .jsonl; .txt is plain text")
    if not rows:
        raise ValueError(f"{source} has no rows")
    for row in rows:
        if not isinstance(row.columns, dict):
            kind = type(row.columns).__name__
            raise ValueError(f"{row.place} is of type {kind}: accepted is an object")
        for name in columns:
            if name not in row.columns:
                there = ", ".join(map(str, row.columns)) or "none"
                wanted = ", ".join(columns)
                raise ValueError(
                    f"{row.place} has no column {name!r}: its columns are {there}; "
                    f"expected are {wanted}"
                )
    return rows


def read_documents(source: str) -> list[str]:
    """The documents of a .txt file, or of the column "text" of rows.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    path = _local(source)
    if path is None or path.suffix != ".txt":
        documents = [row.text("text") for row in read_rows(source, _COLUMNS["text"])]
    else:
        documents = re.split(rf"(?m)^{re.escape(DOCUMENT_END)}[ \t]*$", _read(path))
    documents = [text.strip("\n") for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"{source} has no text")
    return documents


def _local(source: str) -> Path | None:
    """The file, or None where `source` can only be the id of a hub data set."""
    accepted = f"a file ({', '.join(SUFFIXES)}) or the id of a data set on the hub"
    if not source.strip():
        raise ValueError(f"the data set {source!r} has no name: accepted is {accepted}")
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{source}: accepted is {accepted}")
        return path
    if path.is_dir():
        raise ValueError(f"{source} is a folder: accepted is {accepted}")
    if path.suffix in SUFFIXES or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise FileNotFoundError(f"{source}: there is no such file")
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _json_rows(path: Path) -> list[Row]:
    try:
        data = json.loads(_read(path))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not JSON: {error.msg} at {where}") from None
    if isinstance(data, dict) and "data" in data:
        data = data["data"]
    if not isinstance(data, list):
        raise ValueError(f'{path}: accepted is a list of objects, or an object with it as "data"')
    return [Row(f"{path}, row {number}", columns) for number, columns in enumerate(data, 1)]


def _jsonl_rows(path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): JSON strings may hold other line ends, such as U+2028.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row(f"{path}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            where = f"line {number}, column {error.colno}"
            raise ValueError(f"{path} is not JSON: {error.msg} at {where}") from None
    return rows


def _hub_rows(name: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(name, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        message = f"{name}: there is no such file, and the hub does not give it: {reason}"
        raise FileNotFoundError(message) from error
    return [Row(f"{name}, row {number}", dict(columns)) for number, columns in enumerate(data, 1)]


def prefix_tokens(tokenizer: Any) -> list[int]:
    """What every sequence starts with: [bos], or [] for a tokenizer without."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    # Some folders do not name the bos token that their tokenizer nevertheless puts in front.
    added = tokenizer("").get("input_ids", [])
    return [int(token) for token in added if token != tokenizer.eos_token_id][:1]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text as it is: no bos, no eos."""
    if not texts:
        return []
    # Without `verbose=False` transformers warns of texts longer than the model's context.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def encode_source(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text with exactly one bos in front (none for a tokenizer without)."""
    head = prefix_tokens(tokenizer)
    # A text may spell its bos out.
    return [
        tokens if head and tokens[:1] == head else head + tokens
        for tokens in encode(tokenizer, texts)
    ]


def encode_pairs(
    tokenizer: Any, sources: Sequence[str], targets: Sequence[str], *, join: bool
) -> list[tuple[list[int], list[int]]]:
    """Tokens of each source (bos in front) and of each target, tokenized apart.

    Args:
        tokenizer: of transformers.
        sources: prompts.
        targets: their continuations.
        join: put one space between the two where neither has white space at the seam, and give
            that space to the side where this tokenizer has it in running text: "the cat" is
            "the" + " cat" for byte-level BPE, while SentencePiece puts the space in front of "cat"
            by itself.
    """
    if join:
        seams = [_seam(*pair) for pair in zip(sources, targets, strict=True)]
        implied = _implies_space(tokenizer, seams)
        sources = [source for source, _, _ in seams]
        targets = [target if implied else space + target for _, space, target in seams]
    return list(zip(encode_source(tokenizer, sources), encode(tokenizer, targets), strict=True))


def _seam(source: str, target: str) -> tuple[str, str, str]:
    """The source, the space that belongs in front of the target ("" or " "), the target."""
    if target.startswith(" "):
        return source, " ", target[1:]
    if source.endswith(" "):
        return source[:-1], " ", target
    bare = source and target and not source[-1].isspace() and not target[0].isspace()
    return source, " " if bare else "", target


def _implies_space(tokenizer: Any, seams: Sequence[tuple[str, str, str]]) -> bool:
    """Whether the target alone already has the tokens that it has behind a space.

    Decided by the first pair whose tokens, cut apart, are those of the running text.
    """
    for source, space, target in seams[:64]:
        if not (source and space and target):
            continue
        whole, left, spaced, plain = encode(
            tokenizer, [source + " " + target, source, " " + target, target]
        )
        if left + spaced == whole:
            return False
        if left + plain == whole:
            return True
    return False


def _windows(source: str, length: int, tokenizer: Any) -> list[Example]:
    documents = read_documents(source)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [np.array(ids + end, np.int32) for ids in encode_source(tokenizer, documents)]
    stream = np.concatenate(parts)
    examples = []
    for start in range(0, len(stream) - 1, length):
        tokens = stream[start : start + length]
        if len(tokens) > 1:
            examples.append(Example(tokens, np.arange(len(tokens)) > 0))
    if not examples:
        raise ValueError(f"{source} has fewer than 2 tokens")
    return examples
