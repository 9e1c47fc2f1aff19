"""A model as lm-evaluation-harness sees it."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from irqlora_jax.data.batches import by_length, eval_batches
from irqlora_jax.data.examples import Example
from irqlora_jax.evaluate.choices import Question, stream_scores
from irqlora_jax.evaluate.perplexity import row_nll
from irqlora_jax.generate.decode import generate
from irqlora_jax.model.llama import Llama

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
logger = logging.getLogger(__name__)


class HarnessLM(TemplateLM):
    """A model as lm-eval sees it; answers are those of its own `HFLM` for the same weights.

    A text is encoded as its tokenizer does by itself: with a bos in front for LLaMA's, and without
    a second one where it is spelled out. So the text of `loglikelihood_rolling` has two, that of
    the window and its own, as with `HFLM`. An empty context is bos, or eos without one. What is
    longer than the context of the model is cut on the left, bos first, as `HFLM` does (our own
    tasks keep it). Where continuations begin is settled by `TemplateLM._encode_pair`.
    """

    def __init__(
        self,
        model: Llama,
        variables: Any,
        tokenizer: Any,
        batch_size: int = 8,
        *,
        kept: "Kept | None" = None,
        progress: bool = False,
    ) -> None:
        """Keeps the arguments, which are those of `harness`."""
        super().__init__()
        self.model, self.variables, self.tokenizer = model, variables, tokenizer
        self.batch_size = batch_size
        self.truncated = 0
        self._kept = Kept(None, "") if kept is None else kept
        self._progress = progress
        self._drawn = 0
        self._texts: list[str] = []
        self._encoded: dict[str, np.ndarray] = {}

    @property
    def max_length(self) -> int:
        """Tokens that the model can see."""
        return self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_token_id
        return self.model.config.eos_token_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of its folder."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; None adds what the tokenizer adds, unless it is there already."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        if string in self._encoded:
            return self._encoded[string].tolist()
        return self._encode([string])[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts, with what the tokenizer adds unless it is there already."""
        bos = self.tokenizer.decode([self.prefix_token_id])
        found: list[Any] = [None] * len(texts)
        for there in (False, True):
            places = [i for i, text in enumerate(texts) if text.startswith(bos) == there]
            part = [texts[place] for place in places]
            encoded = (
                self.tokenizer(part, add_special_tokens=not there)["input_ids"] if part else []
            )
            for place, tokens in zip(places, encoded, strict=True):
                found[place] = tokens
        return found

    def loglikelihood(
        self, requests: Any, disable_tqdm: bool | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether it is the likeliest."""
        quiet = not self._progress if disable_tqdm is None else disable_tqdm
        # What `_encode_pair` will ask for, encoded together, which takes a fraction of the time.
        pairs = [request.args for request in requests]
        texts = dict.fromkeys(
            text for context, end in pairs for text in (context.rstrip(), context + end)
        )
        tokens = (np.array(row, np.int32) for row in self._encode(list(texts)))
        self._encoded = dict(zip(texts, tokens, strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=quiet)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        """The same of (texts, context, continuation), the latter two as tokens.

        Continuations of one context share rows, and contexts what they begin with.
        """
        answers: list[Any] = [None] * len(requests)
        asked: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            context, continuation = self._fit(context, continuation)
            answers[index] = self._kept.get("loglikelihood", context, continuation)
            if answers[index] is None:
                asked.setdefault(context, {}).setdefault(continuation, []).append(index)
        questions = [Question("", context, tuple(parts), 0) for context, parts in asked.items()]
        with self._bar("Log-likelihoods", len(requests), disable_tqdm) as bar:
            bar.update(sum(answer is not None for answer in answers))
            arguments = (self.model, self.variables, questions, self.batch_size)
            for number, sums, likeliest in stream_scores(*arguments):
                question = questions[number]
                if not np.isfinite(sums).all():
                    raise ValueError("the model gives no numbers (NaN or infinite logits)")
                for part, total, greedy in zip(question.choices, sums, likeliest, strict=True):
                    answer = [float(total), bool(greedy)]
                    self._kept.put(answer, "loglikelihood", question.prompt, part)
                    for index in asked[question.prompt][part]:
                        answers[index] = answer
                        bar.update(1)
        return [(total, greedy) for total, greedy in answers]

    def _fit(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The two as the model can see them: nothing has to be seen behind the last token."""
        count = len(continuation)
        if not 0 < count <= self.max_length:
            raise ValueError(
                f"a continuation has {count} tokens: accepted are 1 to max_position_embeddings = "
                f"{self.max_length}"
            )
        over = max(0, len(context) + count - self.max_length - 1)
        self.truncated += over > 0
        return tuple(context[over:]), tuple(continuation)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool | None = None) -> list[float]:
        """Log-probability (nats) of each whole text, in windows as lm-eval defines them."""
        texts = [request.args[0] for request in requests]
        totals: list[Any] = [self._kept.get("rolling", text) for text in texts]
        open_ = [index for index, total in enumerate(totals) if total is None]
        windows: list[Example] = []
        owners: list[int] = []
        for index in open_:
            tokens = self.tok_encode(texts[index])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, part = make_disjoint_window(pair)
                row = np.array([*context, *part], np.int32)
                windows.append(Example(row, np.arange(len(row)) >= len(context)))
                owners.append(index)
        for index in open_:
            totals[index] = 0.0
        order = by_length([len(window.tokens) for window in windows], self.batch_size)
        with self._bar("Windows", len(windows), disable_tqdm) as bar:
            batches = eval_batches(windows, self.batch_size)
            for part, batch in zip(order, batches, strict=True) if windows else ():
                values, _ = row_nll(self.model, self.variables, batch)
                for place, value in zip(part, np.asarray(values, np.float64), strict=False):
                    totals[owners[place]] -= float(value)
                bar.update(len(part))
        if not np.isfinite(totals).all():
            raise ValueError("the model gives no numbers (NaN or infinite logits)")
        for index in open_:
            self._kept.put(totals[index], "rolling", texts[index])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool | None = None) -> list[str]:
        """Continues each context up to one of its `until`, which are cut off.

        Greedy, unless do_sample asks for draws (temperature, top_k, top_p). A context leaves room
        for max_gen_toks (256) tokens and is cut on the left for that.

        Raises:
            ValueError: an argument of the generation that is not among these, or no room.
        """
        answers: list[Any] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            context, settings = request.args
            setting = json.dumps(settings, sort_keys=True)
            if not settings.get("do_sample"):
                answers[index] = self._kept.get("generate", context, setting)
            if answers[index] is None:
                groups.setdefault(setting, []).append(index)
        with self._bar("Texts", len(requests), disable_tqdm) as bar:
            bar.update(sum(answer is not None for answer in answers))
            for setting, members in groups.items():
                contexts = [requests[index].args[0] for index in members]
                for place, text in self._continue(contexts, json.loads(setting)):
                    answers[members[place]] = text
                    if not json.loads(setting).get("do_sample"):
                        self._kept.put(text, "generate", contexts[place], setting)
                    bar.update(1)
        return answers

    def _continue(
        self, contexts: Sequence[str], settings: dict[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Index and text of every context, for one set of arguments."""
        settings = dict(settings)
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = [
            settings.pop(name, None)
            for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        ]
        new = next((length for length in lengths if length is not None), 256)
        if unknown := sorted(set(settings) - set(_SAMPLING)):
            accepted = ", ".join(("until", "max_gen_toks", *_SAMPLING))
            raise ValueError(f"generation_kwargs has {', '.join(unknown)}: accepted are {accepted}")
        if new >= self.max_length:
            raise ValueError(
                f"max_gen_toks = {new}: accepted are fewer than max_position_embeddings = "
                f"{self.max_length}"
            )
        sampling: dict[str, Any] = {}
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            sampling = {"temperature": float(settings.get("temperature", 1.0))}
            sampling |= {name: settings.get(name) for name in ("top_k", "top_p")}
        room = self.max_length - new
        encoded = [tokens or [self.prefix_token_id] for tokens in self._encode(contexts)]
        self.truncated += sum(len(tokens) > room for tokens in encoded)
        prompts = [tokens[-room:] for tokens in encoded]
        ends = {self.eot_token_id, *self.model.config.eos_token_ids, *self._stops(until)}
        for part in by_length([len(prompt) for prompt in prompts], self.batch_size):
            # Filled up with copies, which end when the first row does: one shape.
            rows = [prompts[place] for place in part]
            rows += [rows[0]] * (self.batch_size - len(rows))
            if sampling:
                sampling["key"] = jax.random.fold_in(jax.random.key(0), self._drawn)
                self._drawn += 1
            written = generate(
                self.model, self.variables, rows, new, eos_token_ids=ends, **sampling
            )
            for place, tokens in zip(part, written, strict=False):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                for stop in until:
                    text = text.split(stop)[0] if stop else text
                yield place, text

    def _stops(self, until: Sequence[str]) -> list[int]:
        """Tokens that contain one of the texts: nothing behind them is ever read."""
        if not self._texts:
            count = min(len(self.tokenizer), self.model.config.vocab_size)
            self._texts = self.tokenizer.batch_decode([[token] for token in range(count)])
        texts = enumerate(self._texts)
        return [token for token, text in texts if any(stop and stop in text for stop in until)]

    def _bar(self, name: str, total: int, quiet: bool | None) -> Any:
        quiet = not self._progress if quiet is None else quiet
        return tqdm(total=total, desc=name, disable=quiet)


class Kept:
    """Answers by request, written to a file as they are given: an interruption loses none."""

    def __init__(self, path: Path | None, identity: str) -> None:
        """Reads the answers in the file, if they are those of the same model."""
        self._path, self._answers = path, {}
        self._head = json.dumps({"key": hashlib.sha256(identity.encode()).hexdigest()})
        self._open = False
        if path is None or not path.is_file():
            return
        head, *lines = path.read_text(encoding="utf-8").split("\n")
        if head != self._head:
            return
        for line in lines[:-1]:  # the last one is empty, or was broken off
            key, answer = json.loads(line)
            self._answers[key] = answer

    def get(self, *request: Any) -> Any:
        """The answer to a request, or None."""
        return self._answers.get(_digest(request))

    def put(self, answer: Any, *request: Any) -> None:
        """Keeps an answer. What cannot be written is only said: hours of work do not end by it."""
        key = _digest(request)
        self._answers[key] = answer
        if self._path is None:
            return
        try:
            if not self._open:
                # Anew, so that no line stands behind one that an interruption broke off.
                self._path.parent.mkdir(parents=True, exist_ok=True)
                lines = [self._head, *(json.dumps(item) for item in self._answers.items())]
                self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                self._open = True
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, answer]) + "\n")
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s), so an interrupted evaluation begins anew",
                *(self._path, error.strerror),
            )
            self._path = None


def _digest(request: Any) -> str:
    return hashlib.sha256(repr(request).encode()).hexdigest()
