"""Finetune a quantized LLaMA: python train.py --config FILE [--section.field value ...]"""

import sys

from irqlora_jax import cli


def main(argv: list[str]) -> int:
    """The command `irqlora train`; returns its exit code."""
    return cli.main(["train", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
