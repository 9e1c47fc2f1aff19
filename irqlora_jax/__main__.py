"""`python -m irqlora_jax` is the command `irqlora`."""

import sys

from irqlora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
