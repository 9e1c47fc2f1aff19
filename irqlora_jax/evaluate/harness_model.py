"""Adapts a model to the interface of lm-evaluation-harness."""

import contextlib
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

from irqlora_jax.data.batches import batches_by_length, eval_batches
from irqlora_jax.data.examples import Example
from irqlora_jax.evaluate.choices import Question, stream_scores
from irqlora_jax.evaluate.perplexity import row_nll
from irqlora_jax.files.checksums import check_seal, seal
from irqlora_jax.generate.decode import generate
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.llama import Llama
from irqlora_jax.processes import fetch

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
logger = logging.getLogger(__name__)


class HarnessLM(TemplateLM):
    """The interface of lm-eval to a model. Its answers equal those of lm-eval's `HFLM`.

    The tokenizer adds its usual special tokens, e.g. bos for LLaMA. If the text already starts
    with bos, no second one is added. In `loglikelihood_rolling` a text has two, as with `HFLM`:
    one from the window and one of its own. An empty context is bos, or eos if there is no bos.
    Inputs longer than the context of the model are truncated on the left, including bos, as in
    `HFLM` (our own tasks keep bos). `TemplateLM._encode_pair` splits context and continuation.
    """

    def __init__(
        self,
        model: Llama,
        variables: Any,
        tokenizer: Any,
        batch_size: int = 8,
        *,
        cache: "AnswerCache | None" = None,
        progress: bool = False,
    ) -> None:
        """Stores the arguments; see `harness`."""
        super().__init__()
        self.model, self.variables, self.tokenizer = model, variables, tokenizer
        self.batch_size = batch_size
        self.truncated = 0
        self._cache = AnswerCache(None, "") if cache is None else cache
        self._progress = progress
        self._drawn = 0
        self._texts: list[str] = []
        self._encoded: dict[str, np.ndarray] = {}

    @property
    def max_length(self) -> int:
        """Context length of the model, in tokens."""
        return self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_token_id
        return self.model.config.eos_token_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, made from its folder."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenizes a text. With None the tokenizer adds its special tokens unless bos is there."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        if string in self._encoded:
            return self._encoded[string].tolist()
        return self._encode([string])[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenizes texts with the special tokens of the tokenizer, unless bos is there already."""
        bos = self.tokenizer.decode([self.prefix_token_id])
        found: list[Any] = [None] * len(texts)
        for has_bos in (False, True):
            places = [i for i, text in enumerate(texts) if text.startswith(bos) == has_bos]
            part = [texts[place] for place in places]
            encoded = (
                self.tokenizer(part, add_special_tokens=not has_bos)["input_ids"] if part else []
            )
            for place, tokens in zip(places, encoded, strict=True):
                found[place] = tokens
        return found

    def loglikelihood(
        self, requests: Any, disable_tqdm: bool | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether greedy decoding gives it."""
        quiet = not self._progress if disable_tqdm is None else disable_tqdm
        # Encode all texts that `_encode_pair` needs in one call, which is much faster.
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
        """Like `loglikelihood` for (texts, context, continuation), the latter two as tokens.

        Continuations of one context share rows; contexts share the cache of a common prefix.
        """
        answers: list[Any] = [None] * len(requests)
        asked: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            context, continuation = self._fit(context, continuation)
            answers[index] = self._cache.get("loglikelihood", context, continuation)
            if answers[index] is None:
                asked.setdefault(context, {}).setdefault(continuation, []).append(index)
        questions = [Question("", context, tuple(parts), 0) for context, parts in asked.items()]
        with self._bar("Log-likelihoods", len(requests), disable_tqdm) as bar:
            bar.update(sum(answer is not None for answer in answers))
            scores = stream_scores(self.model, self.variables, questions, self.batch_size)
            for number, sums, likeliest in scores:
                question = questions[number]
                if not np.isfinite(sums).all():
                    raise ValueError("the logits of the model are NaN or infinite")
                for part, total, greedy in zip(question.choices, sums, likeliest, strict=True):
                    answer = [float(total), bool(greedy)]
                    self._cache.put(answer, "loglikelihood", question.prompt, part)
                    for index in asked[question.prompt][part]:
                        answers[index] = answer
                        bar.update(1)
        return [(total, greedy) for total, greedy in answers]

    def _fit(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Truncates the context. The last token of the continuation is only predicted."""
        count = len(continuation)
        if not 0 < count <= self.max_length:
            raise ValueError(
                f"a continuation has {count} tokens: expected 1 to max_position_embeddings = "
                f"{self.max_length}"
            )
        over = max(0, len(context) + count - self.max_length - 1)
        self.truncated += over > 0
        return tuple(context[over:]), tuple(continuation)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool | None = None) -> list[float]:
        """Log-probability (nats) of each whole text, in the windows of lm-eval."""
        texts = [request.args[0] for request in requests]
        totals: list[Any] = [self._cache.get("rolling", text) for text in texts]
        remaining = [index for index, total in enumerate(totals) if total is None]
        windows: list[Example] = []
        owners: list[int] = []
        for index in remaining:
            tokens = self.tok_encode(texts[index])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, part = make_disjoint_window(pair)
                row = np.array([*context, *part], np.int32)
                windows.append(Example(row, np.arange(len(row)) >= len(context)))
                owners.append(index)
        for index in remaining:
            totals[index] = 0.0
        order = batches_by_length([len(window.tokens) for window in windows], self.batch_size)
        with self._bar("Windows", len(windows), disable_tqdm) as bar:
            batches = eval_batches(windows, self.batch_size)
            for part, batch in zip(order, batches, strict=True) if windows else ():
                values, _ = row_nll(self.model, self.variables, batch)
                for place, value in zip(part, fetch(values).astype(np.float64), strict=False):
                    totals[owners[place]] -= float(value)
                bar.update(len(part))
        if not np.isfinite(totals).all():
            raise ValueError("the logits of the model are NaN or infinite")
        for index in remaining:
            self._cache.put(totals[index], "rolling", texts[index])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool | None = None) -> list[str]:
        """Continues each context up to one of its `until` strings, which are removed.

        Decoding is greedy, unless do_sample asks for sampling (temperature, top_k, top_p). A
        context is truncated on the left to leave room for max_gen_toks (256) tokens.

        Raises:
            ValueError: an unsupported argument of the generation, or no room for new tokens.
        """
        answers: list[Any] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            context, settings = request.args
            setting = json.dumps(settings, sort_keys=True)
            if not settings.get("do_sample"):
                answers[index] = self._cache.get("generate", context, setting)
            if answers[index] is None:
                groups.setdefault(setting, []).append(index)
        with self._bar("Texts", len(requests), disable_tqdm) as bar:
            bar.update(sum(answer is not None for answer in answers))
            for setting, members in groups.items():
                contexts = [requests[index].args[0] for index in members]
                for place, text in self._continue(contexts, json.loads(setting)):
                    answers[members[place]] = text
                    if not json.loads(setting).get("do_sample"):
                        self._cache.put(text, "generate", contexts[place], setting)
                    bar.update(1)
        return answers

    def _continue(
        self, contexts: Sequence[str], settings: dict[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Yields index and new text of every context, for one set of generation arguments."""
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
            raise ValueError(f"generation_kwargs has {', '.join(unknown)}: expected {accepted}")
        if new >= self.max_length:
            raise ValueError(
                f"max_gen_toks = {new}: expected fewer than max_position_embeddings = "
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
        for part in batches_by_length([len(prompt) for prompt in prompts], self.batch_size):
            # Fill the batch with copies of the first row, so that all batches have one shape.
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
        """Tokens that contain one of the texts: generation can end there."""
        if not self._texts:
            count = min(len(self.tokenizer), self.model.config.vocab_size)
            self._texts = self.tokenizer.batch_decode([[token] for token in range(count)])
        texts = enumerate(self._texts)
        return [token for token, text in texts if any(stop and stop in text for stop in until)]

    def _bar(self, name: str, total: int, quiet: bool | None) -> Any:
        quiet = not self._progress if quiet is None else quiet
        return progress_bar(name, total, show=not quiet)


class AnswerCache:
    """Answers by request. They are also appended to a file, so that an interruption loses none."""

    def __init__(self, path: Path | None, identity: str) -> None:
        """Reads the answers in the file, if they belong to the same model."""
        self._path, self._answers = path, {}
        self._head = json.dumps({"key": hashlib.sha256(identity.encode()).hexdigest()})
        self._open = False
        if path is None or not path.is_file():
            return
        head, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if head != self._head:
            return
        for line in lines:  # the last one may be incomplete; damaged ones are answered again
            with contextlib.suppress(ValueError, AttributeError, KeyError, RecursionError):
                values = check_seal(json.loads(line), "answer")
                self._answers[values["request"]] = values["answer"]

    def get(self, *request: Any) -> Any:
        """Returns the answer to a request, or None."""
        return self._answers.get(_digest(request))

    def put(self, answer: Any, *request: Any) -> None:
        """Stores an answer. A write error is only logged: it must not end hours of work."""
        key = _digest(request)
        self._answers[key] = answer
        if self._path is None:
            return
        try:
            if not self._open:
                # Rewrite the file: an interruption may have left an incomplete last line.
                self._path.parent.mkdir(parents=True, exist_ok=True)
                lines = [self._head, *(_line(*item) for item in self._answers.items())]
                self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                self._open = True
            else:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_line(key, answer) + "\n")
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s), so an interrupted evaluation starts again from zero",
                self._path,
                error.strerror,
            )
            self._path = None


def _line(key: str, answer: Any) -> str:
    return json.dumps(seal({"request": key, "answer": answer}))


def _digest(request: Any) -> str:
    return hashlib.sha256(repr(request).encode()).hexdigest()
