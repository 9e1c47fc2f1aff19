"""Makes the Pallas sources importable as irqlora_jax.kernels.*

In a checkout they are in the sibling folder kernels/, in an installed wheel next to this file. The
folder has no __init__.py: as a top-level package it would shadow the package named `kernels` that
transformers looks for.
"""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(d) for d in (_here / "kernels", _here.parent / "kernels") if d.is_dir()][:1]
