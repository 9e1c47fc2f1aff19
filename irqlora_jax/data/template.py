"""Renders chat templates in another process, with limits of time and memory.

A chat template is a program that comes with a model. It can loop without end, or fill the memory
with a single multiplication. Python cannot stop that inside of its own process.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 3
"""Time for one conversation. Usual templates need less than a millisecond."""
MEMORY = 2**29
"""Address space of the process, in bytes. Python itself takes a tenth of it."""
CHARACTERS = 2**24
"""Longest text."""

# transformers prepares what a template sees. This template of ours writes that down.
_SEEN = (
    "{{ {'messages': messages, 'tools': tools, 'documents': documents, "
    "'add_generation_prompt': add_generation_prompt} | tojson(ensure_ascii=true) }}"
)
_FAILURES = {
    "syntax": "is not a Jinja template",
    "failed": "failed for the conversation",
    "stopped": "was stopped",
}
_lock = threading.Lock()


def render(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    template: str | None,
    *,
    prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[str]:
    """Returns the text of each conversation, as `tokenizer.apply_chat_template` writes it.

    The arguments are those of `chat.render_chat`.

    Raises:
        ValueError: the template is not valid Jinja, fails, or was stopped.
    """
    try:
        text = tokenizer.get_chat_template(template, tools)
        seen = tokenizer.apply_chat_template(
            conversations,
            tools=tools,
            chat_template=_SEEN,
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except Exception as error:  # transformers raises many types
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template {_FAILURES['failed']}: {reason}") from None
    asked = {"template": text, "seen": seen, "tokens": tokenizer.special_tokens_map}
    found = _ask(asked | {"seconds": SECONDS})
    for kind, words in _FAILURES.items():
        if kind in found:
            raise ValueError(f"the chat template {words}: {found[kind]}")
    return found["texts"]


@functools.lru_cache(1)
def _process(parent: int) -> subprocess.Popen[str]:
    """Starts the process. It ends with its parent, and a forked parent gets another one."""
    script = Path(__file__).with_name("template_process.py")
    limits = map(str, (MEMORY, CHARACTERS))
    process = subprocess.Popen(
        # -P: else modules of this folder would stand in for modules of Python
        [sys.executable, "-P", str(script), *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    atexit.register(_end, process, parent)
    return process


def _end(process: subprocess.Popen[str], parent: int) -> None:
    """Ends the process, closes its pipes and waits, in the process that started it."""
    if os.getpid() == parent:
        process.kill()
        with contextlib.suppress(BrokenPipeError), process:
            pass


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Sends a request to the process and returns its answer."""
    with _lock:
        process, line = _process(os.getpid()), ""
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request, default=str) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            if not line.endswith("\n"):  # stopped, or an interrupt came in between
                _process.cache_clear()
                _end(process, os.getpid())
    if line.endswith("\n"):
        return json.loads(line)
    if process.returncode == -signal.SIGALRM:
        return {"stopped": f"it takes more than {SECONDS} seconds for one conversation"}
    return {"stopped": f"its process ended with exit code {process.returncode}"}
