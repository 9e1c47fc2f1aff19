"""What a run needs besides its weights, read and checked before anything that takes long."""

import dataclasses
import logging
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
from irqlora_jax.data import Example, Pair, hold_out, load_examples, load_pairs
from irqlora_jax.data.calibrate import CalibrationRows, read_calibration
from irqlora_jax.evaluate import Question, load_questions
from irqlora_jax.export.quantized import absorbed_base
from irqlora_jax.files.hub import is_hub_id, read_config, snapshot
from irqlora_jax.generate.samples import Samples, read_samples
from irqlora_jax.messages import progress_bar
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_stacks
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.matmul import check_implementation, preferred_layout
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.folder import BASE_FILE
from irqlora_jax.runs.load import is_base, read_architecture, read_tokenizer, with_end_tokens
from irqlora_jax.runs.state import make_model, make_optimizer
from irqlora_jax.sharding import make_mesh

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run needs except its weights. It does not change during the training."""

    config: Config
    mesh: Mesh
    model: Llama
    optimizer: optax.GradientTransformation
    examples: list[Example] | list[Pair]
    eval_examples: list[Example] | list[Pair]
    questions: list[Question]
    samples: Samples
    calibrate: CalibrationRows | None

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
    if is_hub_id(source):  # its files are here now
        llama = read_architecture(snapshot(source), config.quant)
    llama = with_end_tokens(llama, tokenizer, source)
    with progress_bar("Reading the data", show=config.log.progress):
        examples, eval_examples = _load_data(config, tokenizer, llama.max_position_embeddings)
        rows = _load_calibration(given, source, tokenizer, llama.max_position_embeddings)
    if config.train.early_stopping and not eval_examples:
        raise ValueError(
            f"train.early_stopping = {config.train.early_stopping}: needs an evaluation loss; "
            "expected 0, or set data.eval or data.eval_fraction"
        )
    questions = []
    if asked.questions is not None:
        questions = load_questions(asked.questions, tokenizer, asked.max_questions)
    samples = read_samples(config, tokenizer, llama)
    sequences = [*(e.tokens for e in (*examples, *eval_examples)), *samples.prompts]
    highest = max(int(max(tokens)) for tokens in sequences)
    if highest >= llama.vocab_size:  # indexing would silently clamp it
        raise ValueError(
            f"model = '{config.model}': the tokenizer yields token {highest}, the embedding has "
            f"{llama.vocab_size} rows; expected a tokenizer that belongs to the model"
        )
    model = make_model(llama, config.adapter, config.train)
    check_adapter(model, config.quant)
    optimizer = make_optimizer(config.train, config.adapter.chosen)
    return Job(config, mesh, model, optimizer, examples, eval_examples, questions, samples, rows)


def with_chosen_rules(job: Job, asked: QuantConfig, limit: int | None = None) -> Job:
    """Chooses rules for a budget, with a table of errors in the folder of the run.

    Args:
        job: of a new run.
        asked: quantization settings with the budget.
        limit: as for `read_job`.

    Raises:
        ValueError: as `base.budget.choose_rules`; or the mesh or the adapter do not suit the rules.
    """
    config, llama = job.config, job.model.config
    options: dict[str, Any] = {"calibrate": job.calibrate, "limit": limit}
    options |= {"mesh": job.mesh, "progress": config.log.progress}
    quant = choose_rules(config.model, asked, Path(config.output_dir), **options)
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


def _load_data(config: Config, tokenizer: Any, max_length: int) -> tuple[list[Any], list[Any]]:
    data = config.data
    if not data.train:
        raise ValueError("data.train = '': expected a file or the id of a data set")
    load: Any = load_pairs if data.format == "preference" else load_examples
    examples = load(data.train, data, tokenizer, max_length)
    if data.eval is not None:
        return examples, load(data.eval, data, tokenizer, max_length)
    return hold_out(examples, data.eval_fraction, config.seed)
