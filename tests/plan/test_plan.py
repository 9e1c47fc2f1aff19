"""The plan: what is stored is exact, what is suggested fits, and nothing is read or written."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from irqlora_jax.adapters import METHODS
from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.base.file import base_shapes, read_base, save_base
from irqlora_jax.base.storage import abstract_base, measure_base
from irqlora_jax.cli import main
from irqlora_jax.config import Config, TrainConfig
from irqlora_jax.data import longest_row
from irqlora_jax.data.config import DataConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.plan import fit
from irqlora_jax.plan import plan as plans
from irqlora_jax.plan.fit import with_planned_rules
from irqlora_jax.plan.gpus import DEVICES, find_device
from irqlora_jax.plan.measure import (
    TIGHT,
    MemoryNeed,
    PlanDevice,
    find_plan_device,
    measure,
    read_base_shapes,
)
from irqlora_jax.quant.budget import AllocationOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.state import init_state, make_model, make_optimizer
from irqlora_jax.sharding import MeshConfig, device_bytes
from tests.architectures import MODELS
from tests.models import LLAMA, random_base, tiny_llama, write_config, write_run

pytestmark = pytest.mark.usefixtures("optimizer_promotion")

# Widths that 4 devices can split.
SMALL = dataclasses.replace(
    LLAMA, vocab_size=512, hidden_size=128, intermediate_size=320, head_dim=16
)
CONFIG = Config(
    "model",
    "folder",
    adapter=AdapterConfig(rank=8),
    data=DataConfig(source_length=40, target_length=24),
    train=TrainConfig(batch_size=4, compute_dtype="float32"),
    mesh=MeshConfig(data=1),
)


def write_model(folder: Path, llama: LlamaConfig = SMALL, **more: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama.to_dict() | {"dtype": "float32"} | more))
    return folder


def target(memory: int) -> PlanDevice:
    return PlanDevice("a device", jax.devices(), memory, memory)


_measured: dict[str, MemoryNeed] = {}


def measure_once(
    config: Config, base: Any, llama: LlamaConfig, target: PlanDevice, limit: int | None = None
) -> MemoryNeed:
    """`measure` that compiles the step of the same settings once for all tests of this file."""
    key = repr((dataclasses.replace(config, model=CONFIG.model), llama))
    if key not in _measured:
        need = measure(config, base, llama, target, limit)
        if not need.step:
            return need
        _measured[key] = need
    need = _measured[key]
    stored = dataclasses.replace(need, step=0)
    return need if limit is None or stored.peak <= limit else stored


def need_of(**changes: Any) -> MemoryNeed:
    """What `CONFIG`, with other fields, needs for the model `SMALL`."""
    config = dataclasses.replace(CONFIG, **changes)
    return measure_once(config, abstract_base(SMALL, config.quant), SMALL, target(2**40))


PLAIN = [(name, size, "none") for name in ("nf4", "nf3", "int2", "none") for size in (64, 40)]


@pytest.mark.parametrize(("name", "block", "calibration"), [*PLAIN, ("nf4", 64, "icq")])
def test_a_base_file_is_as_long_as_the_arithmetic_says(
    tmp_path: Path, name: Any, block: int, calibration: Any
) -> None:
    # Widths that are no multiple of a block, so that rows are padded.
    sizes = {"hidden_size": 256, "intermediate_size": 600, "num_key_value_heads": 4}
    wide = dataclasses.replace(LLAMA, vocab_size=4000, num_hidden_layers=1, **sizes)
    quant = QuantConfig(format=name, block_size=block, calibration=calibration)
    base = random_base(wide, quant)
    file = tmp_path / "base.safetensors"
    save_base(file, base, wide, quant)
    stored = measure_base(abstract_base(wide, quant, np.float32))
    assert stored == measure_base(base)
    assert abs(file.stat().st_size / stored.total - 1) < 0.01
    shapes, llama = base_shapes(file)
    assert llama == wide and measure_base(shapes) == stored
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, shapes, read_base(file)[0]))


@pytest.mark.long
def test_a_budget_is_planned_with_its_size(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the largest base that fits does fit, and fills the memory."""
    few = AllocationOptions(("nf2", "nf4"), (64,), (8,))
    quant = QuantConfig(calibration="none", budget="fit", allocation=few)
    config = dataclasses.replace(CONFIG, model=str(write_model(tmp_path / "model")), quant=quant)
    smallest = quant.candidates[0]
    base = abstract_base(SMALL, smallest, np.float32)
    need = measure(dataclasses.replace(config, quant=smallest), base, SMALL, target(2**40))
    monkeypatch.setattr(fit, "measure", lambda *_: need)  # compiles the same
    # Room for half of what nf4 needs more.
    half = measure_base(abstract_base(SMALL, quant.candidates[1], np.float32)).total // 2
    half -= measure_base(base).total // 2
    device = target(int((need.peak + half) / TIGHT) + 1)
    planned = with_planned_rules(config, device)
    size = int(said[-1].split(" MB")[0].split()[-1])
    found = measure(planned, *read_base_shapes(planned), device)
    step = 2 * half // SMALL.num_hidden_layers
    assert 0 <= found.base.total - (need.base.total + half) < step
    assert abs(size * 10**6 - found.base.total) < 10**6 + step
    as_bytes = dataclasses.replace(quant, budget=f"{found.base.total / 1000:.3f}KB")
    again = with_planned_rules(dataclasses.replace(config, quant=as_bytes), device)
    assert again == planned
    with pytest.raises(ValueError, match=r"quant\.budget = 'fit': expected .* less on a device"):
        with_planned_rules(config, target(need.peak))


def test_a_budget_that_fits_a_mesh_fills_every_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices hold half of the packed weights each, so the whole base may grow by twice as
    much as a device has room."""
    few = AllocationOptions(("nf2", "nf4"), (64,), (8,))
    quant = QuantConfig(calibration="none", budget="fit", allocation=few)
    deep = dataclasses.replace(SMALL, num_hidden_layers=8)
    own = {"model": str(write_model(tmp_path / "model", deep)), "quant": quant}
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=2), **own)

    def stored(quant: QuantConfig, config: Config = config) -> MemoryNeed:
        """What a device holds; compiles nothing."""
        one = dataclasses.replace(config, quant=quant)
        base = abstract_base(deep, quant, np.float32)
        return measure(one, base, deep, target(2**40), limit=0)

    small, large = (stored(one) for one in quant.candidates)
    alone = stored(quant.candidates[0], dataclasses.replace(config, mesh=MeshConfig(data=1)))
    assert small.base.total < 0.7 * alone.base.total
    need = dataclasses.replace(small, step=2**20)
    monkeypatch.setattr(fit, "measure", lambda *_: need)
    half = (large.base.total - small.base.total) // 2
    device = target(int((need.peak + half) / TIGHT) + 1)
    found = stored(with_planned_rules(config, device).quant)
    layer = (large.base.total - small.base.total) / 8
    assert abs(found.base.total - small.base.total - half) < layer


def test_bits_of_llama_7b() -> None:
    """4 bits a code; 8 bits a scale and 8 a shift every 64 weights, 32 every 256 of those."""
    stored = measure_base(abstract_base(MODELS["7b"], QuantConfig()))
    assert stored.weights == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert stored.codes * 8 == 4 * stored.weights
    assert stored.shifts * 8 == stored.weights * (8 + 32 / 256) / 64
    assert stored.scales - stored.shifts == 32 * 7 * 4  # a mean for every matrix
    assert stored.rest == 2 * (2 * 32000 * 4096 + 65 * 4096)


def test_the_plan_counts_the_arrays_of_a_run() -> None:
    base, need = abstract_base(SMALL, CONFIG.quant), need_of()
    model = make_model(SMALL, CONFIG.adapter, CONFIG.train)
    state = init_state(model, make_optimizer(CONFIG.train), 0)
    assert need.base.total == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))
    assert need.adapters == sum(x.nbytes for x in jax.tree.leaves(state.adapters))
    assert need.optimizer == sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    assert need.step > need.adapters  # the gradients at least
    assert (need.rows, need.length, need.devices) == (4, 64, 1)


def test_the_plan_of_pairs_counts_both_rows_and_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiling takes long, so this looks at what would be compiled. A limit of 0 stops before."""
    base, room = abstract_base(SMALL, CONFIG.quant, np.float32), target(2**40)
    plain = measure(CONFIG, base, SMALL, room, 0)
    pairs = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, format="preference"))
    need = measure(pairs, base, SMALL, room, 0)
    assert (need.rows, need.length, need.adapters) == (4, 64, plain.adapters)
    text = plans._table(pairs, need, room)
    assert "4 pairs of rows of 64 tokens per forward pass, 1 passes per step, and as many" in text
    fitted = dataclasses.replace(pairs, adapter=dataclasses.replace(pairs.adapter, init="loftq"))
    assert measure(fitted, base, SMALL, room, 0).adapters == 2 * plain.adapters

    seen: list[Any] = []

    class SeenError(Exception):
        """In place of compiling."""

    def trace(state: Any, base: Any, batch: Any, reference: Any) -> Any:
        same = jax.tree.structure(reference) == jax.tree.structure(state.adapters)
        seen.append((batch["tokens"].shape, same))
        raise SeenError

    def make(*_: Any, preference: bool, **__: Any) -> Any:
        seen.append(preference)
        return types.SimpleNamespace(trace=trace)

    monkeypatch.setattr("irqlora_jax.plan.measure.make_step", make)
    for config, expected in ((CONFIG, False), (pairs, True), (fitted, True)):
        with pytest.raises(SeenError):
            measure(config, base, SMALL, room)
        shape = (8 if expected else 4, 64)
        assert seen == [expected, (shape, config is fitted)]
        seen.clear()


def adapter_size(method: str, out: int, into: int, rank: int) -> int:
    """Parameters of a layer, with the default options of the method."""
    pair = rank * (out + into)
    groups = into // 64
    pooled = rank * (out + groups)
    inner = rank * (out + into) // (out // 2 + into // 2)
    return {
        "lora": pair,
        "iec": pair + 2,
        "dora": pair + out,
        "bayesian": pair + rank + 3 * 4 + rank,  # lora_E, gates of bits, gates of ranks
        "binary": pair + rank + out,  # a scale for each row of both factors
        "lokr": 8 * 8 + (out // 8) * (into // 8),  # kron of 8 x 8 and the rest, for a large rank
        "qalora": pooled,
        "qalora_iec": pooled + 2,
        "qbara": inner * (out // 2 + into // 2),
        "qahira": (out // 8) * (into // 4),
    }[method]


@pytest.mark.parametrize("scales", [0, 64])
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_the_parameters_of_every_method(method: Any, scales: int) -> None:
    if scales and METHODS[method].prepare is not None:
        pytest.skip("refuses adapter.scales")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    llama = tiny_llama(**sizes, num_key_value_heads=4, head_dim=16)
    adapter = AdapterConfig(method=method, rank=8, scales=scales)
    config = dataclasses.replace(CONFIG, adapter=adapter)
    # Nothing is compiled, since the base alone is above a limit of 0.
    need = measure(config, abstract_base(llama, config.quant), llama, target(2**40), limit=0)
    blocks = 2 if scales else 0  # of scales and of shifts
    expected = llama.num_hidden_layers * sum(
        adapter_size(method, out, into, 8) + blocks * out * into // 64
        for out, into in llama.linear_shapes.values()
    )
    assert need.adapters == 4 * expected
    assert 8 * expected <= need.optimizer < 8 * expected + 64  # both moments, and counters


def test_a_mesh_is_planned_device_by_device() -> None:
    one, four = need_of(), need_of(mesh=MeshConfig(data=1, fsdp=4))
    assert four.devices == 4
    assert 4 * four.base.codes == one.base.codes
    assert four.adapters < 0.5 * one.adapters and four.peak < one.peak


def test_an_offloaded_state_is_counted_on_the_host() -> None:
    train = dataclasses.replace(CONFIG.train, offload_optimizer=True)
    here, away = need_of(), need_of(train=train)
    assert here.host == 0 and away.host > 0.95 * here.optimizer
    assert away.host + away.optimizer == here.optimizer


@pytest.mark.long
@pytest.mark.parametrize("share", [1.2, 0.6])
def test_suggested_settings_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], share: float
) -> None:
    folder = write_config(tmp_path / "model", SMALL, dtype="float32")
    config = dataclasses.replace(CONFIG, model=str(folder))
    base, llama = read_base_shapes(config)
    memory = int(share * need_of().peak)
    monkeypatch.setattr(plans, "measure", measure_once)
    monkeypatch.setattr(plans, "find_plan_device", lambda *_: target(memory))
    monkeypatch.setattr(plans, "_MAX_ROWS", 8)
    fits = plans.plan(config)
    text = "\n".join(said)
    assert fits == (share > 1) == ("fits, with" in text)
    if fits:
        return
    flags = text.split("fits with:")[1].split()
    changes = {
        k[2:]: json.loads(v) if v != "bfloat16" else v
        for k, v in zip(flags[::2], flags[1::2], strict=True)
    }
    assert changes
    new = plans._replace_fields(config, changes)
    found = measure_once(new, base, llama, target(memory))
    assert found.step and found.peak <= memory


def test_an_unknown_device_is_refused_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model=nowhere", f"--output_dir={tmp_path / 'run'}", "--plan", "gtx1080"]
    assert main(["train", *flags]) == 2
    said = capsys.readouterr().err
    assert "gtx1080" in said and all(name in said for name in DEVICES)


@pytest.mark.parametrize("name", ["H200", "NVIDIA H200", "RTX A6000", "a100 80GB", "RTX 4090"])
def test_devices_go_by_the_names_that_people_use(name: str) -> None:
    assert find_device(name).title.split()[-1].lower() in name.lower().replace("80gb", "gb")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a100", "plan = 'a100': expected a100-40 or a100-80"),
        ("NVIDIA A100", "expected a100-40 or a100-80"),
        ("h10", r"b200 \(did you mean h100\?\)"),
        ("", "expected one of t4"),
    ],
)
def test_an_ambiguous_or_unknown_device(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_device(name)


def test_without_the_compiler_for_gpus_the_plan_says_that_it_estimates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from a folder with a config.json alone, writing nothing."""
    folder = write_model(tmp_path / "model")
    monkeypatch.setattr("irqlora_jax.plan.measure.compile_only_devices", lambda *_: None)
    monkeypatch.setattr("irqlora_jax.plan.measure.prepare", lambda *_: None)
    monkeypatch.setattr(plans, "_most_rows", lambda *given: (0, given[-1]))  # two programs less
    out = tmp_path / "run"
    flags = [f"--model={folder}", f"--output_dir={out}", "--train.batch_size=2", "--plan=t4"]
    assert main(["train", *flags]) == 0
    said = capsys.readouterr().out
    assert "estimated" in said and "T4" in said and "fits" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model"]


def test_only_config_json_is_fetched_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = write_config(tmp_path / "model", SMALL, torch_dtype="float16"), []

    def fetch(repo: str, filename: str, local_files_only: bool) -> str:
        asked.append((repo, filename))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    base, llama = read_base_shapes(dataclasses.replace(CONFIG, model="owner/name"))
    assert llama == SMALL and base["norm"]["weight"].dtype == np.float16
    assert set(asked) == {("owner/name", "config.json")}


def test_a_quantized_base_is_planned_from_its_header(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "base", adapter=None)
    quant = QuantConfig(calibration="none")
    base, llama = read_base_shapes(dataclasses.replace(CONFIG, model=str(folder), quant=quant))
    assert llama == LLAMA
    assert device_bytes(base) == device_bytes(read_base(folder / "base.safetensors")[0])
    with pytest.raises(ValueError, match="calibration"):
        read_base_shapes(dataclasses.replace(CONFIG, model=str(folder)))


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (DataConfig(), 512),
        (DataConfig(source_length=700, target_length=2), 704),
        (DataConfig(format="text", sequence_length=20), 24),
        (DataConfig(packing=True, packing_length=777), 777),
        (DataConfig(source_length=4000), 2048),
    ],
)
def test_the_longest_row(data: DataConfig, length: int) -> None:
    assert longest_row(data, 2048) == length


@pytest.mark.parametrize(("size", "most"), [("7b", 7.2), ("65b", 50.0)])
def test_the_budgets_hold_by_the_estimate_too(size: str, most: float) -> None:
    """Looser than those of tests/cuda, which need jax's CUDA plugin."""
    config = dataclasses.replace(
        Config("model", "folder", mesh=MeshConfig(data=1)), train=TrainConfig(batch_size=1)
    )
    found = dataclasses.replace(find_plan_device(None, 1), compiler="estimate", shared=False)
    need = measure(config, abstract_base(MODELS[size], config.quant), MODELS[size], found)
    assert need.peak / 2**30 <= most


def test_a_plan_with_a_kernel_equals_one_with_xla() -> None:
    """It is made where the kernel's device may not be."""
    assert need_of(train=dataclasses.replace(CONFIG.train, matmul="triton")) == need_of()
