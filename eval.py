"""Evaluate a run: python eval.py --run DIR --task NAME [--field value ...]"""

import sys

from irqlora_jax import cli


def main(argv: list[str]) -> int:
    """The command `irqlora eval`; returns its exit code."""
    return cli.main(["eval", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
