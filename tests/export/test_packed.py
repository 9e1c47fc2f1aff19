"""Integers in the layout of GPTQ, and what each layout refuses. tests/parity has the programs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.qalora import QaloraOptions
from irqlora_jax.export.folder import ExportConfig, export
from irqlora_jax.export.integers import pack_words
from irqlora_jax.quant.calibrations.icq import IcqOptions
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.runs.load import load_run
from tests.models import FLOAT, IEC, NARROW, quantize_base, random_base, tiny_llama, write_run

WIDE = tiny_llama(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_key_value_heads=2,
    head_dim=16,
)
PLAIN4 = QuantConfig(format="int4", calibration="none", block_size=32)
NAMES = {"q_proj": "self_attn", "k_proj": "self_attn", "down_proj": "mlp"}


def exported(folder: Path, run: Path, kind: str, **options: Any) -> Path:
    settings: dict[str, Any] = {"progress": False, "kind": kind, **options}
    return export(ExportConfig(str(run), str(folder), **settings))


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of `bits` bits from a stream of words, bit by bit: the definition of the format."""
    found = []
    for i in range(count):
        value = 0
        for bit in range(bits):
            place = i * bits + bit
            word = int(words[place // 32]) & 0xFFFFFFFF
            value |= (word >> place % 32 & 1) << bit
        found.append(value)
    return np.array(found)


def gptq_weight(tensors: dict[str, np.ndarray], bits: int, minus_one: bool) -> np.ndarray:
    """The matrix [out, in] of a layer, as GPTQ's format defines it."""
    rows, columns = tensors["scales"].shape[1], len(tensors["g_idx"])
    codes = np.stack([unpack(column, bits, columns) for column in tensors["qweight"].T])
    zeros = np.stack([unpack(group, bits, rows) for group in tensors["qzeros"]]) + minus_one
    scales, group = tensors["scales"].astype(np.float32), tensors["g_idx"]
    return (scales[group] * (codes.T - zeros[group])).T


GPTQ = {
    "int4, zero points": (PLAIN4, True),
    "int3": (dataclasses.replace(PLAIN4, format="int3", block_size=64), True),
    "int2, symmetric": (dataclasses.replace(PLAIN4, format="int2", symmetric=True), False),
    "int8, symmetric": (dataclasses.replace(PLAIN4, format="int8", symmetric=True), False),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq(tmp_path: Path, case: str, said: list[str]) -> None:
    quant, zeros = GPTQ[case]
    base = quantize_base(random_base(WIDE), quant)
    run = write_run(tmp_path / "run", WIDE, quant, None, base=base)
    out = exported(tmp_path / "out", run, "gptq")
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert described == json.loads((out / "quantize_config.json").read_text())
    bits, minus_one = int(quant.format[3:]), described["checkpoint_format"] == "gptq"
    assert (described["bits"], described["group_size"]) == (bits, quant.block_size)
    assert described["sym"] != zeros and not described["desc_act"]
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert file.get_tensor("model.norm.weight").dtype == np.float16
        for name, group in NAMES.items():
            stem = f"model.layers.0.{group}.{name}."
            tensors = {
                key.removeprefix(stem): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118
                if key.startswith(stem)
            }
            assert tensors.keys() == {"qweight", "qzeros", "scales", "g_idx"}
            weight = base["layers"][group][name]["weight"]
            codes = np.asarray(jax.jit(lambda w: w.codes())(weight))[0].astype(np.float32)
            scale, shift = (np.asarray(x)[0] for x in (weight.scale(), weight.shift()))
            zero = np.round(-shift / scale)
            assert not minus_one or zero.min() >= 1
            half = scale.astype(np.float16).astype(np.float32)
            wide = (np.repeat(x, quant.block_size, 1) for x in (half, zero))
            half, zero = wide
            expected = half * (codes - zero)
            np.testing.assert_array_equal(gptq_weight(tensors, bits, minus_one), expected)
    (line,) = (line for line in said if "rounded scales" in line)
    assert float(line.split("at most ")[1].split()[0]) < 100 * 2**-10


def test_a_zero_point_of_0_needs_the_second_version(tmp_path: Path) -> None:
    """Blocks without negative weights have it; the first version stores zero points minus one."""
    base = random_base(WIDE)
    for number, wanted in ((0.0, "gptq"), (1.0, "gptq_v2")):
        own = jax.tree.map(lambda x: x, base)
        q_proj = own["layers"]["self_attn"]["q_proj"]
        q_proj["weight"] = q_proj["weight"].at[0, 0].add(number)
        packed = quantize_base(own, PLAIN4)
        run = write_run(tmp_path / wanted, WIDE, PLAIN4, None, base=packed)
        out = exported(tmp_path / f"{wanted}_out", run, "gptq")
        described = json.loads((out / "quantize_config.json").read_text())
        assert described["checkpoint_format"] == wanted


def test_words_are_packed_without_gaps() -> None:
    rng = np.random.default_rng(0)
    for bits in (2, 3, 4, 8):
        codes = rng.integers(0, 2**bits, (3, 40), np.uint8)
        words = pack_words(codes, bits)
        assert words.dtype == np.int32 and words.shape == (3, -(-40 * bits // 32))
        np.testing.assert_array_equal([unpack(row, bits, 40) for row in words], codes)


NF4 = QuantConfig(format="nf4", calibration="none")
QALORA = AdapterConfig("qalora", rank=2, alpha=4.0, qalora=QaloraOptions(64))
REFUSED: dict[str, tuple[str, Any, QuantConfig, Any, str]] = {
    "integers": ("bitsandbytes", WIDE, PLAIN4, None, "has format int4; expected nf4 or fp4, or"),
    "3 bits": (
        "bitsandbytes",
        WIDE,
        dataclasses.replace(NF4, format="nf3"),
        None,
        "has format nf3; expected nf4 or fp4",
    ),
    "shifts": (
        "bitsandbytes",
        WIDE,
        QuantConfig(icq=IcqOptions(steps=1)),
        None,
        "has shifts, for which bitsandbytes has no place; expected a base with quant.calibration",
    ),
    "blocks": (
        "bitsandbytes",
        WIDE,
        dataclasses.replace(NF4, block_size=16),
        None,
        "has blocks of 16; expected 32, 64, 128",
    ),
    "rows": ("bitsandbytes", NARROW, NF4, None, "has rows of 40 in blocks of 64; expected whole"),
    "outliers": (
        "bitsandbytes",
        WIDE,
        dataclasses.replace(NF4, outliers=0.01),
        None,
        "has outliers, for which the layout has no place; expected a base without outliers",
    ),
    "no base": ("gptq", WIDE, FLOAT, None, "the base is not quantized; expected kind merged"),
    "floats": ("gptq", WIDE, NF4, None, "has format nf4; expected int8, int4, int3 or int2"),
    "groups": (
        "gptq",
        WIDE,
        dataclasses.replace(PLAIN4, block_size=16),
        None,
        "has blocks of 16; expected 32, 64, 128, or kind merged",
    ),
    "sizes": (
        "gptq",
        dataclasses.replace(WIDE, intermediate_size=72),
        PLAIN4,
        None,
        "gate_proj has 72 outputs and 64 inputs; expected multiples of 32, or kind merged",
    ),
    "zero points": (
        "gptq",
        WIDE,
        QuantConfig(format="int4", block_size=32, icq=IcqOptions(search="zero_point", steps=2)),
        None,
        "has zero points between whole numbers; expected quant.calibration none or gptq, or icq",
    ),
    "trained shifts": (
        "compressed-tensors",
        WIDE,
        PLAIN4,
        AdapterConfig("lora", rank=2, scales=32),
        "has trained shifts, which are no whole zero points",
    ),
    "no pair": (
        "gptq",
        WIDE,
        PLAIN4,
        AdapterConfig("qahira", rank=2),
        "no LoRA pair computes the update of QA-HiRA; expected merged or quantized",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    kind, llama, quant, adapter, message = REFUSED[case]
    run = write_run(tmp_path / "run", llama, quant, adapter)
    with pytest.raises(ValueError, match=message):
        exported(tmp_path / "out", run, kind)
    assert not (tmp_path / "out").exists()


def test_gptq_has_one_format_for_all(tmp_path: Path) -> None:
    some = quantize_base(random_base(WIDE), PLAIN4, ("q_proj", "o_proj"))
    run = write_run(tmp_path / "some", WIDE, PLAIN4, None, base=some)
    with pytest.raises(ValueError, match=r"k_proj is not quantized; expected all linear layers"):
        exported(tmp_path / "out", run, "gptq")
    rest = set(NAMES) | {"v_proj", "gate_proj", "up_proj"}
    mixed = quantize_base(some, dataclasses.replace(PLAIN4, block_size=64), rest - {"q_proj"})
    run = write_run(tmp_path / "mixed", WIDE, PLAIN4, None, base=mixed)
    with pytest.raises(ValueError, match=r"differ in block_size: .* expected one quant.format"):
        exported(tmp_path / "out", run, "gptq")


def test_the_adapter_is_beside(tmp_path: Path) -> None:
    """PEFT's files name the base by its folder; methods that absorb have them too."""
    run = write_run(tmp_path / "run", WIDE, PLAIN4, IEC)
    out = exported(tmp_path / "out", run, "gptq")
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(out) and adapter["r"] == IEC.rank
    assert (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file()
    card = (out / "README.md").read_text()
    assert "vllm serve out --enable-lora --lora-modules adapter=out/adapter" in card
    assert load_run(run).step == 3
