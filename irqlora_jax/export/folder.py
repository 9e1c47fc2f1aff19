"""Exports runs: an adapter, a merged model or a dequantized base for transformers and PEFT, a
quantized base with the adapter inside, or files for other programs."""

import dataclasses
import json
import logging
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from irqlora_jax.base.file import has_base, read_base_config, read_calibrate
from irqlora_jax.base.updates import with_scales
from irqlora_jax.export.aside import complete_or_absent
from irqlora_jax.export.bitsandbytes import BITSANDBYTES
from irqlora_jax.export.card import Card
from irqlora_jax.export.compressed import COMPRESSED
from irqlora_jax.export.gguf import BYTES, EXACT, GGUF_FILE, save_gguf
from irqlora_jax.export.gguf_adapter import save_gguf_adapter
from irqlora_jax.export.gguf_tokenizer import tokenizer_fields
from irqlora_jax.export.gptq import GPTQ
from irqlora_jax.export.model import parameters, save_model
from irqlora_jax.export.packed import save_packed
from irqlora_jax.export.peft import save_adapter
from irqlora_jax.export.programs import PROGRAMS
from irqlora_jax.export.quantized import absorbed_base, save_quantized
from irqlora_jax.export.upload import check_access, check_name, upload
from irqlora_jax.files.hub import is_hub_id
from irqlora_jax.files.small import read_json
from irqlora_jax.messages import progress_bar, shows_messages
from irqlora_jax.runs.folder import BASE_FILE
from irqlora_jax.runs.load import Run, is_base, load_run, scores
from irqlora_jax.sharding import MeshConfig, make_mesh
from irqlora_jax.text import require

_GENERATION = "generation_config.json"
_LAYOUTS = {"bitsandbytes": BITSANDBYTES, "gptq": GPTQ, "compressed-tensors": COMPRESSED}
_WITH_ADAPTER = ("adapter", "dequantized", *_LAYOUTS)
"""Kinds that write an adapter for PEFT."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a run for transformers and PEFT, as a quantized base, or for other programs."""

    run: str
    """Folder of a run, of `irqlora quantize`, or of a Hugging Face model, or a .gguf file."""
    output_dir: str
    """New folder."""
    kind: Literal[
        "adapter",
        "merged",
        "dequantized",
        "quantized",
        "gguf",
        "bitsandbytes",
        "gptq",
        "compressed-tensors",
    ] = "merged"
    """"merged": a model that includes the adapter. "dequantized": the dequantized base as a model,
    with the adapter for PEFT in its folder adapter/. "adapter": only this adapter. "quantized": a
    base like that of irqlora quantize, with the adapter in the shifts of its blocks. Only methods
    with pooled inputs (adapter.method) and trained scales (adapter.scales) can be merged like
    this. "gguf": a file model.gguf for llama.cpp that includes the adapter. The other kinds hold
    the codes of the base as they are, with the adapter for PEFT in adapter/. "bitsandbytes": NF4 or
    FP4 without shifts. "gptq" and "compressed-tensors": integers with whole zero points."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of all weights. Null: the original file's type for models, float32 for adapters. With
    kind quantized, the type of the trained changes of scales and shifts: float16 (null) rounds
    them by up to 0.05 %, float32 keeps them. With kinds gptq and compressed-tensors, null is
    float16, and the scales have this type too (with gptq always float16)."""
    checkpoint: Literal["last", "best"] | int = "last"
    """Checkpoint of the run: the newest, the one with the best evaluation loss, or a step."""
    fold: bool = True
    """With kind adapter: fold the method exactly into a plain LoRA pair. False keeps its own
    tensors, such as IEC's scalars in the released IR-QLoRA code or the bits of binary factors. PEFT
    ignores them."""
    base_model: str | None = None
    """base_model_name_or_path of adapters: folder or hub id of the base for PEFT's auto classes.
    Null: with kind adapter, the original model if it was not quantized, else nothing; with the
    kinds that write it to adapter/, push_to_hub or else the absolute path of output_dir."""
    shard_size: float = 5.0
    """Largest file of a model, in GB."""
    push_to_hub: str | None = None
    """Also upload the folder with its model card to this repository of the Hugging Face hub
    (OWNER/NAME), which is made if there is none. The token is HF_TOKEN or the login of `hf auth
    login`. Null: no upload."""
    private: bool = False
    """With push_to_hub: only the owner can see the repository."""
    progress: bool = True
    """Show a progress bar."""
    type: Literal["f16", "bf16", "q8_0", "q4_0", "q4_1", "exact"] | None = None
    """With kind gguf: type of the matrices (null: f16). "exact": the codes of an integer base as
    they are; blocks must be multiples of 32. The adapter is in the shifts, where its method allows
    that, else in adapter.gguf."""
    mesh: MeshConfig = MeshConfig(data=1)
    """Devices to split the model over, if it does not fit on one."""

    def __post_init__(self) -> None:
        ok = 0 < self.shard_size < math.inf
        require(ok, "shard_size", self.shard_size, "a positive number")
        ok = self.fold or self.kind == "adapter"
        require(ok, "fold", self.fold, f"true with kind {self.kind}")
        ok = self.base_model is None or self.kind in _WITH_ADAPTER
        require(ok, "base_model", self.base_model, f"null with kind {self.kind}")
        ok = self.type is None or self.kind == "gguf"
        require(ok, "type", self.type, f"null with kind {self.kind}")
        ok = self.dtype is None or self.kind != "gguf"
        require(ok, "dtype", self.dtype, "null with kind gguf, which has type")
        ok = self.dtype != "bfloat16" or self.kind != "quantized"
        require(ok, "dtype", self.dtype, "float16 or float32 with kind quantized")
        ok = not self.private or self.push_to_hub is not None
        require(ok, "private", self.private, "false without push_to_hub")
        if self.push_to_hub is not None:
            check_name(self.push_to_hub)


@shows_messages
def export(config: ExportConfig) -> Path:
    """Exports a run. The output folder appears only when it is complete.

    Everything is written to a folder OUTPUT_DIR.part, which is renamed at the end. It remains only
    if the process is killed. The same command then starts again in it.

    Args:
        config: what to export, and where to.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: bad input or a full disk; the message is one sentence. No files remain.
            If only the upload fails, the folder remains.
    """
    folder = _write(config)
    logger.info(f"{config.kind}: {folder} (how to load it: {folder / 'README.md'})")
    _upload(config, folder)
    return folder


def _write(config: ExportConfig) -> Path:
    folder = Path(config.output_dir).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output_dir = '{folder}': exists; expected a new folder")
    if config.push_to_hub is not None:
        check_access(config.push_to_hub)
    mesh = make_mesh(config.mesh, (config.mesh.data or 1) * config.mesh.fsdp)
    split = mesh.size > 1
    with jax.set_mesh(mesh) if split else nullcontext(), complete_or_absent(folder) as aside:
        with progress_bar("Loading the model", show=config.progress):
            where = mesh if split else None
            run = load_run(config.run, checkpoint=config.checkpoint, mesh=where)
        _check(config, run, aside, folder)
        if config.kind == "quantized":
            with progress_bar("Writing the base", show=config.progress):
                save_quantized(aside, run, config.dtype or "float16")
            _companions(aside, folder.name, run, config, "quantized", config.dtype or "float16")
        elif config.kind == "gguf":
            _gguf_folder(aside, folder.name, run, config)
        elif config.kind == "adapter":
            base = config.base_model or _original(run)
            if config.push_to_hub is not None and config.base_model is None:
                base = base if base and is_hub_id(base) else None  # no path of this machine
            _adapter_folder(aside, folder.name, run, config, base)
        else:
            if config.kind in _LAYOUTS:
                _packed_folder(aside, folder.name, run, config)
            else:
                _model_folder(aside, folder.name, run, config)
            if config.kind in _WITH_ADAPTER and run.step is not None:
                (aside / "adapter").mkdir()
                base = config.base_model or config.push_to_hub or str(folder)
                _adapter_folder(aside / "adapter", f"{folder.name}/adapter", run, config, base)
    return folder


def _upload(config: ExportConfig, folder: Path) -> None:
    if config.push_to_hub is not None:
        options = {"private": config.private, "progress": config.progress}
        place = upload(folder, config.push_to_hub, **options)
        logger.info(f"uploaded to {place}")


def export_adapter(run: str | Path, out: str | Path, **options: Any) -> Path:
    """`export` with kind "adapter"; `options` are the other fields of `ExportConfig`."""
    return _quiet(run, out, "adapter", options)


def export_merged(run: str | Path, out: str | Path, **options: Any) -> Path:
    """`export` with kind "merged"; `options` are the other fields of `ExportConfig`."""
    return _quiet(run, out, "merged", options)


def export_dequantized(run: str | Path, out: str | Path, **options: Any) -> Path:
    """`export` with kind "dequantized"; `options` are the other fields of `ExportConfig`."""
    return _quiet(run, out, "dequantized", options)


def _quiet(run: str | Path, out: str | Path, kind: Any, options: dict[str, Any]) -> Path:
    settings: dict[str, Any] = {"progress": False} | options
    config = ExportConfig(str(run), str(out), kind, **settings)
    folder = _write(config)
    _upload(config, folder)
    return folder


def _check(config: ExportConfig, run: Run, aside: Path, folder: Path) -> None:
    """Checks that the export is possible before it starts."""
    if config.kind in ("adapter", "quantized") and run.step is None:
        raise ValueError(
            f"run = '{config.run}': has no adapter; expected the folder of a run, or kind merged"
        )
    adapter = run.model.adapter
    method = adapter and adapter.chosen
    unknown = method is not None and method.fold is None and method.peft is None
    if config.type == EXACT and method is not None and not (method.fold or method.reduced):
        raise ValueError(
            f"type = 'exact': no LoRA pair computes the update of {method.title}; expected f16, "
            "bf16, q8_0, q4_0 or q4_1"
        )
    for_peft = config.kind in _WITH_ADAPTER
    if config.kind == "adapter" and adapter and adapter.scales:
        raise ValueError(
            "kind = 'adapter': adapter.scales changed the base, for which PEFT has no place; "
            "expected merged, dequantized or quantized"
        )
    if for_peft and config.fold and adapter and unknown:
        raise ValueError(
            f"kind = {config.kind!r}: no LoRA pair computes the update of {adapter.chosen.title}; "
            f"expected {'merged or quantized' if adapter.chosen.reduced else 'merged'}"
        )
    size = sum(leaf.nbytes for leaf in _leaves(run.variables["params"]))
    if config.kind == "quantized" or config.kind in _LAYOUTS:
        size += sum(leaf.nbytes for leaf in _leaves(run.variables["base"]))
    elif config.kind == "gguf":
        size = (
            sum(leaf.nbytes for leaf in _leaves(run.variables["base"]))
            if config.type == EXACT
            else int(parameters(run.model.config) * BYTES[config.type or "f16"])
        )
    elif config.kind != "adapter":
        size += parameters(run.model.config) * np.dtype(_dtype(config, run)).itemsize
    free = shutil.disk_usage(aside).free
    if size > free:
        raise OSError(
            f"output_dir = '{folder}': needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def _dtype(config: ExportConfig, run: Run) -> str:
    return config.dtype or str(run.variables["base"]["embed_tokens"]["weight"].dtype)


def _model_folder(aside: Path, name: str, run: Run, config: ExportConfig) -> None:
    model, variables = run.model, run.variables
    if config.kind == "dequantized":
        model, variables = with_scales(model, variables)
        model = model.clone(adapter=None)
    dtype = _dtype(config, run)
    save_model(
        aside,
        model,
        variables,
        dtype=dtype,
        shard_size=config.shard_size,
        progress=config.progress,
    )
    _companions(aside, name, run, config, config.kind, dtype)


def _gguf_folder(aside: Path, name: str, run: Run, config: ExportConfig) -> None:
    type, beside = config.type or "f16", False
    model, variables = run.model, run.variables
    if type == EXACT and model.adapter is not None:
        try:
            variables = {"params": {}, "base": absorbed_base(model, variables, "float32")}
        except ValueError:  # the update differs within a block, so it stays an adapter
            save_gguf_adapter(aside / PROGRAMS["gguf"].adapter, model, variables["params"])
            model, variables = with_scales(model, variables)
            beside = True
        model = model.clone(adapter=None)
    fields = tokenizer_fields(run.tokenizer, model.config) | {"general.name": name}
    file, progress = aside / GGUF_FILE, config.progress
    off = save_gguf(file, model, variables, fields, type=type, progress=progress)
    if type == EXACT:
        logger.info(f"exact: scales in float16 move a weight by at most {off:.1e} of the largest")
    _companions(aside, name, run, config, "gguf", type, beside=beside)


def _packed_folder(aside: Path, name: str, run: Run, config: ExportConfig) -> None:
    model, variables = with_scales(run.model, run.variables)
    dtype = config.dtype or (_dtype(config, run) if config.kind == "bitsandbytes" else "float16")
    facts = save_packed(
        aside,
        model,
        variables,
        config.kind,
        _LAYOUTS[config.kind],
        dtype=dtype,
        shard_size=config.shard_size,
        progress=config.progress,
    )
    error = max(getattr(own, "error", 0.0) for own in facts.values())
    if error:
        logger.info(f"{config.kind}: rounded scales differ by at most {100 * error:.2g} %")
    _companions(aside, name, run, config, config.kind, dtype, beside=run.step is not None)


def _adapter_folder(
    aside: Path, name: str, run: Run, config: ExportConfig, base: str | None
) -> None:
    dtype = config.dtype or "float32"
    save_adapter(
        aside, run.model, run.variables["params"], base_model=base, fold=config.fold, dtype=dtype
    )
    _companions(aside, name, run, config, "adapter", dtype, base)


def _companions(
    aside: Path,
    name: str,
    run: Run,
    config: ExportConfig,
    kind: str,
    dtype: str,
    base: str | None = None,
    beside: bool = False,
) -> None:
    """Writes the tokenizer with its chat template, generation settings and the model card."""

    if kind not in ("quantized", "gguf"):
        run.tokenizer.save_pretrained(aside)
    if kind in ("merged", "dequantized", *_LAYOUTS):
        _write_generation(aside, run)
    quant = used = None
    if has_base(run.folder):
        quant = read_base_config(run.folder / BASE_FILE)[1]
        used = read_calibrate(run.folder / BASE_FILE)
    card = Card(
        name=name,
        kind=kind,
        dtype=dtype,
        model=run.source,
        quant=None if quant is None or not quant.quantizes else quant,
        config=run.config,
        step=run.step,
        newest=config.checkpoint == "last",
        base=base,
        folded=config.fold,
        scores=scores(run.folder),
        calibrate=used,
        model_type=run.model.config.model_type,
        beside=beside,
        repository=config.push_to_hub,
    )
    (aside / "README.md").write_text(card.text(), encoding="utf-8")


def _write_generation(aside: Path, run: Run) -> None:
    described = run.model.config.to_dict()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = {name: described[name] for name in names if described[name] is not None}
    for origin in (run.folder / "tokenizer" / _GENERATION, run.folder / _GENERATION):
        if origin.is_file():
            values = {**read_json(origin), "eos_token_id": described["eos_token_id"]}
            break
    (aside / _GENERATION).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _original(run: Run) -> str | None:
    """The original model of a run without quantization, if the adapter can be used with it."""

    source = run.source
    if source is None or run.config is None or run.config.quant.quantizes:
        return None
    if is_hub_id(source):
        return source
    local = Path(source).expanduser().absolute()
    return str(local) if (local / "config.json").is_file() and not is_base(local) else None
