"""What a run needs besides its weights, read and checked before anything that takes long."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from irqlora_jax.base.budget import choose_rules, planned_rules
from irqlora_jax.base.file import base_shapes
from irqlora_jax.base.make import check_text
from irqlora_jax.base.mesh import check_mesh
from irqlora_jax.base.storage import abstract_base
from irqlora_jax.base.updates import with_scales
from irqlora_jax.config import Config
from irqlora_jax.data import Batches, Example, Pair, make_batches, read_chat_template
from irqlora_jax.data.calibrate import CalibrationRows, read_calibration
from irqlora_jax.data.order import Part
from irqlora_jax.data.sources import load_data_sets
from irqlora_jax.data.templates import set_chat_template
from irqlora_jax.evaluate import Question, load_questions
from irqlora_jax.export.quantized import absorbed_base
from irqlora_jax.files.hub import is_hub_id, read_config, snapshot
from irqlora_jax.generate.samples import Samples, read_samples
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.processes import from_first
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.matmul import check_implementation, preferred_layout
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.folder import BASE_FILE
from irqlora_jax.runs.load import is_base, read_architecture, read_tokenizer, with_end_tokens
from irqlora_jax.runs.optimizer import check_rates
from irqlora_jax.runs.state import make_model, make_optimizer
from irqlora_jax.sharding import make_mesh
from irqlora_jax.text import require

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run needs except its weights. It does not change during the training.

    Attributes:
        config: of the run, with the number of steps in place of `train.epochs`.
        mesh: the devices.
        model: without weights.
        optimizer: with the schedule.
        examples: for the training.
        eval_examples: for the evaluation loss.
        questions: for the end of the run.
        samples: prompts for every evaluation.
        calibrate: text for the quantizer.
        batches: for the training, by step.
        parts: the sources of the examples.
        epochs: `train.epochs`.
    """

    config: Config
    mesh: Mesh
    model: Llama
    optimizer: optax.GradientTransformation
    examples: Sequence[Example] | list[Pair]
    eval_examples: list[Example] | list[Pair]
    questions: list[Question]
    samples: Samples
    calibrate: CalibrationRows | None
    batches: Batches
    parts: tuple[Part, ...]
    epochs: float | None = None

    @property
    def stored_config(self) -> Config:
        """The configuration as a run stores it: with `train.epochs` as it was given."""
        if self.epochs is None:
            return self.config
        train = dataclasses.replace(self.config.train, steps=None, epochs=self.epochs)
        return dataclasses.replace(self.config, train=train)

    @property
    def preference(self) -> bool:
        """Whether the examples are preference pairs."""
        return self.config.data.format == "preference"


def read_job(config: Config, source: str | Path, limit: int | None = None) -> Job:
    """Reads everything except the weights, and checks all that can be checked without them.

    A budget is replaced by rules of about its size (`base.budget.planned_rules`), to be replaced by
    `with_chosen_rules`.

    Args:
        config: of the run.
        source: folder or hub id of the model, the folder of a base, or that of a resumed run.
        limit: bytes of the whole base, for `quant.budget` fit.

    Raises:
        FileNotFoundError, ValueError: the model, the data or the configuration cannot be used.
    """
    asked = config.evaluate
    if asked.baselines:
        _check_baselines(config)
    # Check the architecture and the mesh before anything else is read.
    llama, given = read_architecture(source, config.quant), config
    planned = planned_rules(source, llama, config.quant, limit)
    config = dataclasses.replace(config, quant=planned)
    mesh = make_mesh(config.mesh, config.train.rows)
    check_mesh(mesh, llama, config.quant)
    with jax.set_mesh(mesh):
        _check_matmul(config, llama, source)
    tokenizer = read_tokenizer(source)
    set_chat_template(tokenizer, config.data, read_chat_template(config.data.chat_template))
    if is_hub_id(source):  # its files are here now
        llama = read_architecture(snapshot(source), config.quant)
    llama = with_end_tokens(llama, tokenizer, source)
    with progress_bar("Reading the data", show=config.log.progress):
        longest = llama.max_position_embeddings
        sets = load_data_sets(config.data, tokenizer, longest, config.seed)
        rows = _load_calibration(given, source, tokenizer, llama.max_position_embeddings)
    examples, eval_examples, parts = sets
    if config.train.early_stopping and not eval_examples:
        raise ValueError(
            f"train.early_stopping = {config.train.early_stopping}: needs an evaluation loss; "
            "expected 0, or set data.eval or data.eval_fraction"
        )
    questions = []
    if asked.questions is not None:
        questions = load_questions(asked.questions, tokenizer, asked.max_questions)
    samples = read_samples(config, tokenizer, llama)
    # The other examples of a stream are checked when they are read.
    some = examples[:64] if config.data.streaming else examples
    sequences = [*(e.tokens for e in (*some, *eval_examples)), *samples.prompts]
    check_tokens(config, llama, max(int(max(tokens, default=0)) for tokens in sequences))
    sizes = config.train.batch_size, config.seed, longest
    batches = make_batches(examples, config.data, *sizes, parts)
    epochs = config.train.epochs
    config = dataclasses.replace(config, train=config.train.with_steps(batches.rows))
    model = make_model(llama, config.adapter, config.train)
    check_adapter(model, config.quant)
    check_rates(config.train, jax.eval_shape(model.init_adapters, jax.random.key(0)))
    optimizer = make_optimizer(config.train, config.adapter.chosen)
    return Job(
        config,
        mesh,
        model,
        optimizer,
        examples,
        eval_examples,
        questions,
        samples,
        rows,
        batches,
        parts,
        epochs,
    )


def check_warmup(config: Config) -> None:
    """Checks, for a new run, that the warmup ends before the training.

    Raises:
        ValueError: it does not.
    """
    # Not in TrainConfig: runs of earlier versions have to open.
    accepted = f"at most train.steps = {config.train.total_steps}"
    ok = config.train.warmup_steps <= config.train.total_steps
    require(ok, "train.warmup_steps", config.train.warmup_steps, accepted)


def check_tokens(config: Config, llama: LlamaConfig, highest: int) -> None:
    """Checks that the model has an embedding for the highest token of the data.

    Raises:
        ValueError: it has not.
    """
    if highest >= llama.vocab_size:  # indexing would silently clamp it
        raise ValueError(
            f"model = '{config.model}': the tokenizer yields token {highest}, the embedding has "
            f"{llama.vocab_size} rows; expected a tokenizer that belongs to the model"
        )


def with_chosen_rules(job: Job, asked: QuantConfig, limit: int | None = None) -> Job:
    """Chooses rules for a budget, with a table of errors in the folder of the run. Of several
    processes the first one chooses.

    Args:
        job: of a new run.
        asked: quantization settings with the budget.
        limit: as for `read_job`.

    Raises:
        ValueError: as `base.budget.choose_rules`; or the mesh or the adapter do not suit the rules.
    """
    config, llama = job.config, job.model.config
    options: dict[str, Any] = {"calibrate": job.calibrate, "limit": limit}
    alone = jax.process_count() == 1
    options |= {"mesh": job.mesh if alone else None, "progress": config.log.progress}
    folder = Path(config.output_dir)

    def choose() -> str:
        return json.dumps(dataclasses.asdict(choose_rules(config.model, asked, folder, **options)))

    quant = QuantConfig.from_dict(json.loads(from_first(choose)))
    config = dataclasses.replace(config, quant=quant)
    check_mesh(job.mesh, llama, quant)
    with jax.set_mesh(job.mesh):
        _check_matmul(config, llama, config.model)
    check_adapter(job.model, quant)
    return dataclasses.replace(job, config=config)


def check_adapter(model: Llama, quant: QuantConfig) -> None:
    """Checks that the adapter fits the layers and the base, from shapes alone. Also says if its
    update could not become part of the quantized base, which some methods are chosen for.

    Raises:
        ValueError: an option does not suit the shape of a layer, or the base.
    """
    assert model.adapter is not None
    base = abstract_base(model.config, quant)
    variables = {"params": jax.eval_shape(model.init_adapters, jax.random.key(0)), "base": base}
    if model.adapter.scales:
        jax.eval_shape(lambda variables: with_scales(model, variables)[1], variables)
    if model.adapter.chosen.reduced is None or not quant.quantizes:
        return
    try:
        jax.eval_shape(lambda variables: absorbed_base(model, variables, "float32"), variables)
    except ValueError as error:
        logger.info(f"Note: irqlora export --kind quantized will refuse this adapter: {error}")


def _load_calibration(
    config: Config, source: str | Path, tokenizer: Any, max_length: int
) -> CalibrationRows | None:
    # A resumed run has its base, but may make the quantizer alone, for a row of its table.
    alone = config.evaluate.baselines and bool(config.adapter.start_title)
    again = alone and config.quant.needs_text and not is_base(config.model)
    if is_base(source) and not again:
        if is_base(config.model) and config.calibrate.data is not None:
            logger.info(f"calibrate: not used; the base in '{config.model}' is quantized already")
        return None
    check_text(config.quant, config.adapter, config.calibrate)
    return read_calibration(config.calibrate, tokenizer, max_length)


def _check_matmul(config: Config, llama: LlamaConfig, source: str | Path) -> None:
    """Checks that `train.matmul` supports all linear layers."""
    train = config.train
    if train.matmul is None:
        return
    stored = is_base(source)
    base = (
        base_shapes(Path(source) / BASE_FILE)[0] if stored else abstract_base(llama, config.quant)
    )
    for name, stack in linear_stacks(base):
        weight = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
        if isinstance(weight, QTensor):
            weight = dataclasses.replace(weight, layout=preferred_layout(train.matmul))
            if config.adapter.scales and name in config.adapter.targets:
                update = jax.ShapeDtypeStruct(weight.grid, "float32")
                weight = dataclasses.replace(weight, scale_update=update)
        x = jax.ShapeDtypeStruct((train.rows, weight.shape[1]), train.compute_dtype)
        try:
            check_implementation(train.matmul, x, weight)
        except ValueError as error:
            raise ValueError(f"train.matmul: {error}") from error


def _check_baselines(config: Config) -> None:
    needs = "evaluate.baselines = True: needs the full-precision model;"
    if is_base(config.model):
        raise ValueError(f"{needs} model = '{config.model}' holds a quantized base only")
    try:
        read_config(config.model)
    except OSError as error:
        raise FileNotFoundError(f"{needs} {error}") from error
