"""Finetune a quantized LLaMA: python train.py --config FILE [--section.field value ...]"""

import sys

from irqlora_jax.config import parse_config


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 the user's input; anything else raises (1)."""
    try:
        config = parse_config(argv)
        from irqlora_jax.train import run

        run(config)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
