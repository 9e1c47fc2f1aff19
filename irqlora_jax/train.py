"""Training: a pure step over (state, base, batch), and the loop around it."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from irqlora_jax import hf, report
from irqlora_jax.checkpoint import (
    Base,
    Checkpoints,
    MetricsLog,
    check_folder,
    load_base,
    save_base,
    write_text,
)
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.data import Batches, Example, hold_out, load_examples
from irqlora_jax.evaluate import evaluation_loss
from irqlora_jax.llama import Llama, LlamaConfig, head_weight
from irqlora_jax.loss import cross_entropy

Batch = dict[str, Array]
"""tokens int32 [batch, seq] and targets bool [batch, seq]: the tokens that count in the loss."""

_FIRST_LOSS_SCALE = 2.0**15  # float16: halved at every overflow, doubled after so many good steps
_GOOD_STEPS = 1000


@no_type_check  # JAX rebuilds pytrees with leaves of any kind, which runtime checks would refuse
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training, and so all that a checkpoint holds.

    The position in the data is `step`: batches are a function of it. Dropout draws from `key` and
    `step`.
    """

    adapters: dict[str, Any]
    opt_state: Any
    step: Int32[Array, ""]
    key: UInt32[Array, "..."]
    loss_scale: Float32[Array, ""]
    good_steps: Int32[Array, ""]


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Warmup from 0, then constant or down to 0 at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(config.steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW."""
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def init_state(model: Llama, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """New adapters and an empty optimizer."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    adapters = model.init_adapters(init_key)
    return make_state(adapters, optimizer, dropout_key)


def make_state(
    adapters: dict[str, Any], optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
    """A state at step 0 that starts from given adapters."""
    return TrainState(
        adapters=adapters,
        opt_state=optimizer.init(adapters),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        loss_scale=jnp.float32(_FIRST_LOSS_SCALE),
        good_steps=jnp.zeros((), jnp.int32),
    )


def loss_sum(
    adapters: dict[str, Any],
    base: Base,
    tokens: Int32[Array, "batch seq"],
    targets: Bool[Array, "batch seq"],
    dropout_key: Array,
    *,
    model: Llama,
    chunk: int,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Summed negative log-likelihood of the targets in nats, and their number."""
    features: Any = model.apply(
        {"params": adapters, "base": base},
        tokens,
        deterministic=False,
        rngs={"dropout": dropout_key},
        method="features",
    )
    return cross_entropy(features, head_weight(base), tokens, targets, chunk)


def train_step(
    state: TrainState,
    base: Base,
    batch: Batch,
    *,
    model: Llama,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step; gradients for the adapters only.

    The loss is the mean over all targets of the batch, however it is cut by `config.accumulation`.
    With float16 the loss is scaled, and a step that overflows changes nothing but the scale.

    Returns:
        The next state, and the loss (nats per target), the norm of the gradient before clipping,
        the number of targets and, with float16, the loss scale.
    """
    scaled = config.compute_dtype == "float16"
    scale = state.loss_scale if scaled else jnp.float32(1)
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    parts = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), batch)
    keys = jax.random.split(step_key, config.accumulation)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def scaled_loss(adapters: dict[str, Any], part: Batch, key: Array) -> tuple[Array, tuple]:
        nll, count = loss_sum(
            adapters,
            base,
            part["tokens"],
            part["targets"],
            key,
            model=model,
            chunk=config.loss_chunk,
        )
        return nll * (scale / total), (nll, count)

    # The scaling by 1 / targets comes before the backward pass: in float16 the sum would overflow.
    total = jnp.maximum(batch["targets"][:, 1:].sum(), 1).astype(jnp.float32)
    if config.accumulation == 1:
        (_, (nll, count)), grads = scaled_loss(
            state.adapters, jax.tree.map(lambda x: x[0], parts), keys[0]
        )
    else:

        def add(carry: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
            (_, sums), grads = scaled_loss(state.adapters, *inputs)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        zeros = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.adapters)
        ((nll, count), grads), _ = jax.lax.scan(add, zeros, (parts, keys))
    grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
    new = dataclasses.replace(
        state,
        adapters=optax.apply_updates(state.adapters, updates),
        opt_state=opt_state,
        step=state.step + 1,
    )
    metrics = {"loss": nll / total, "grad_norm": norm, "targets": count}
    if scaled:
        new = _after_scaling(state, new, jnp.isfinite(norm))
        metrics["loss_scale"] = scale
    return new, metrics


def _after_scaling(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    good = jnp.where(finite, old.good_steps + 1, 0)
    double = good >= _GOOD_STEPS
    scale = jnp.where(
        finite, jnp.where(double, old.loss_scale * 2, old.loss_scale), old.loss_scale / 2
    )
    keep = lambda a, b: jnp.where(finite, a, b)  # noqa: E731
    return dataclasses.replace(
        new,
        adapters=jax.tree.map(keep, new.adapters, old.adapters),
        opt_state=jax.tree.map(keep, new.opt_state, old.opt_state),
        loss_scale=jnp.clip(scale, 1, 2.0**24),
        good_steps=jnp.where(double, 0, good),
    )


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `run` measured.

    Attributes:
        folder: of the run.
        steps: optimizer steps done in all.
        rows: one row a model (full precision, quantized, finetuned), as in results.json.
    """

    folder: Path
    steps: int
    rows: tuple[report.Row, ...]


def run(config: Config, say: Callable[[str], None] = print) -> RunResult:
    """Quantizes, finetunes, evaluates and saves; goes on where an earlier run stopped.

    Raises:
        ValueError, OSError: bad input, in one sentence; nothing is overwritten then.
    """
    folder = Path(config.output_dir)
    resumed = check_folder(folder, config)
    # What is no LLaMA is refused before anything else is read.
    vocab = hf.read_config(config.model).vocab_size
    tokenizer = hf.load_tokenizer(config.model)
    examples, eval_examples = _load_data(config, tokenizer)
    highest = max(int(example.tokens.max()) for example in [*examples, *eval_examples])
    if highest >= vocab:  # indexing would clamp it in silence
        raise ValueError(
            f"model = '{config.model}': its tokenizer gives token {highest}, its embedding has "
            f"{vocab} rows; accepted is a tokenizer that belongs to the model"
        )
    base, llama, quantize_seconds = _load_or_quantize(folder, config, resumed)
    model = Llama(
        llama,
        adapter=config.adapter,
        compute_dtype=config.train.compute_dtype,
        remat=config.train.remat,
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not resumed:
        tokenizer.save_pretrained(folder / "tokenizer")
        save_base(folder / "base.safetensors", base, llama)
        # The configuration comes last: it marks a folder that can be resumed.
        write_text(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    say(report.describe(config, llama, base, len(examples)))
    optimizer = make_optimizer(config.train)
    state = init_state(model, optimizer, config.seed)
    started = time.perf_counter()
    with Checkpoints(folder, config.train.keep_checkpoints) as checkpoints:
        latest = checkpoints.latest()
        if latest is not None:
            state = checkpoints.restore(latest, state)
            say(f"going on from step {latest} of {folder}")
        state = _loop(
            config, folder, model, optimizer, state, base, examples, eval_examples, checkpoints
        )
    seconds = time.perf_counter() - started
    rows = report.measure(
        config, model, {"params": state.adapters, "base": base}, tokenizer, eval_examples,
        quantize_seconds, seconds,
    )  # fmt: skip
    write_text(folder / "results.json", json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    say(report.table(rows))
    say(report.next_commands(config))
    return RunResult(folder, int(state.step), tuple(rows))


def _load_data(config: Config, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    data = config.data
    if not data.train:
        raise ValueError("data.train = '': accepted is a file or the id of a data set")
    examples = load_examples(data.train, data, tokenizer)
    if data.eval is not None:
        return examples, load_examples(data.eval, data, tokenizer)
    return hold_out(examples, data.eval_fraction, config.seed)


def _load_or_quantize(
    folder: Path, config: Config, resumed: bool
) -> tuple[Base, LlamaConfig, float | None]:
    if resumed:
        return *load_base(folder / "base.safetensors"), None
    started = time.perf_counter()
    base, llama = hf.load_base(config.model, config.quant, progress=config.log.progress)
    jax.block_until_ready(base)
    return base, llama, time.perf_counter() - started


def _loop(
    config: Config,
    folder: Path,
    model: Llama,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    base: Base,
    examples: list[Example],
    eval_examples: list[Example],
    checkpoints: Checkpoints,
) -> TrainState:
    from tqdm.auto import tqdm

    settings = config.train
    batches = Batches(examples, settings.batch_size, config.seed)
    schedule = learning_rate(settings)
    step_function = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, config=settings),
        donate_argnums=0,
    )
    first = int(state.step)
    log = MetricsLog(folder / "metrics.jsonl", first)
    bar = tqdm(
        total=settings.steps,
        initial=first,
        desc="finetuning",
        unit="step",
        disable=not config.log.progress,
    )
    # Metrics are fetched while the device works on the next step.
    waiting: tuple[int, int, dict[str, Array]] | None = None
    clock = time.perf_counter()
    tokens_since = 0

    def fetch() -> None:
        nonlocal clock, tokens_since
        if waiting is None:
            return
        step, tokens, metrics = waiting
        values = {name: float(value) for name, value in metrics.items()}
        tokens_since += tokens
        overflow_is_handled = values.get("loss_scale", 1.0) > 1
        if not math.isfinite(values["loss"]) and not overflow_is_handled:
            saved = checkpoints.latest()
            raise FloatingPointError(
                f"loss = {values['loss']} at step {step}; the last checkpoint is of step {saved}"
            )
        bar.update()
        if step % config.log.every == 0 or step == settings.steps:
            now = time.perf_counter()
            speed = tokens_since / max(now - clock, 1e-9)
            clock, tokens_since = now, 0
            values |= {
                "learning_rate": float(jnp.asarray(schedule(step - 1))),
                "tokens_per_second": round(speed, 1),
            }
            log.write({"step": step} | values)
            memory = report.gigabytes(report.peak_memory())
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:,.0f} tokens/s, {memory}")

    for step in range(first, settings.steps):
        state, metrics = step_function(state, base, batches[step])
        fetch()
        tokens = sum(len(examples[i].tokens) for i in batches.indices(step))
        waiting = (step + 1, tokens, metrics)
        done = step + 1
        last = done == settings.steps
        evaluate = settings.eval_every and done % settings.eval_every == 0 and not last
        save = last or (settings.save_every and done % settings.save_every == 0)
        if evaluate or save:
            fetch()
            waiting = None
        if evaluate and eval_examples:
            variables = {"params": state.adapters, "base": base}
            loss = evaluation_loss(
                model, variables, eval_examples, settings.batch_size, settings.loss_chunk
            )
            log.write({"step": done, "eval_loss": loss})
            tqdm.write(f"step {done}: evaluation loss {loss:.4f}") if config.log.progress else None
        if save:
            checkpoints.save(done, state)
    fetch()
    bar.close()
    return state
