"""Promises about imports and names that other packages depend on."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    """What trains on a GPU needs neither a hub client nor a command-line parser."""
    heavy = ("transformers", "datasets", "huggingface_hub", "jsonargparse", "torch", "orbax")
    loaded = python(f"import irqlora_jax, sys; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


def test_kernels_stays_out_of_the_way_of_transformers() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers, sys; print(getattr(sys.modules.get('kernels'), '__path__', None))"
    assert str(ROOT) not in python(code)
    assert python("import irqlora_jax.kernels as k; print(*k.__path__)") == str(ROOT / "kernels")


def test_no_private_jax_names_and_no_pickles() -> None:
    sources = [*(ROOT / "irqlora_jax").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    sources += [ROOT / "train.py", ROOT / "eval.py"]
    for source in sources:
        text = source.read_text()
        for forbidden in (
            "jax._src",
            "jax.lib.",
            "import pickle",
            "import torch",
            "trust_remote_code=True",
        ):
            assert forbidden not in text, (source, forbidden)


def test_kernels_are_imported_only_where_they_may_be_taken() -> None:
    """While no kernel was measured to be faster at a product, XLA needs nothing of Pallas."""
    code = (
        "import sys, jax, jax.numpy as jnp, irqlora_jax as irq;"
        "w = irq.quantize(jnp.ones((8, 64)), irq.QuantConfig(format='nf4'));"
        "irq.dequant_matmul(jnp.ones((2, 64)), w);"
        "print([m for m in sys.modules if m.startswith('jax.experimental.pallas')])"
    )
    assert python(code) == "[]"
