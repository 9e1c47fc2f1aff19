"""Evaluate a run: python eval.py --run DIR --task factworld | perplexity | generate [--baseline]"""

import sys

from irqlora_jax.evaluate.tasks import evaluate_run, parse_eval


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 the user's input; anything else raises (1)."""
    try:
        evaluate_run(parse_eval(argv))
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
