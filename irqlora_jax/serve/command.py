"""Serves a model on this machine with the OpenAI API (the command `irqlora serve`)."""

import dataclasses
import importlib.util
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from irqlora_jax.generate.conversation import find_style
from irqlora_jax.generate.rows import Rows, Sampling
from irqlora_jax.messages import progress_bar, shows_messages
from irqlora_jax.runs.load import Run, load_run, unpacked
from irqlora_jax.serve.service import Service
from irqlora_jax.serve.worker import Worker
from irqlora_jax.text import readable_size, require

_PACKAGES = ("starlette", "uvicorn")
_LOCAL = ("127.0.0.1", "::1", "localhost")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Serves a model with the OpenAI API: chat completions, completions, streams."""

    run: str
    """Folder of a run, of irqlora quantize, or of a Hugging Face model, or a .gguf file."""
    baseline: bool = False
    """Leave the finetuned adapter out. With LoftQ or CLoQ, use the initial one."""
    checkpoint: Literal["last", "best"] | int = "last"
    """Checkpoint of the adapter: "last", "best" (lowest evaluation loss), or a step number."""
    name: str | None = None
    """Name of the model in requests. Null: the name of the folder."""
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine can reach the default."""
    port: int = 8000
    """Port to listen on. 0: any free port."""
    max_batch: int = 4
    """Texts that are decoded at the same time; others wait. The cache needs memory for all of them,
    and every step computes all of them."""
    max_waiting: int = 64
    """Texts that may wait. While so many wait, a new request gets the status 429."""
    context: int | None = 2048
    """Largest number of tokens of a prompt and its answer. The cache needs memory for all of them.
    Every step reads all of it. Null, or more than the model has: the context of the model."""
    api_key: str | None = None
    """Name of an environment variable with the key that requests must have (Authorization: Bearer
    KEY). Null: they need none."""

    def __post_init__(self) -> None:
        require(self.name != "", "name", self.name, "a name, or null")
        require(0 <= self.port < 2**16, "port", self.port, "0 to 65535")
        require(self.max_batch >= 1, "max_batch", self.max_batch, "a whole number of at least 1")
        accepted = "a whole number of at least 1"
        require(self.max_waiting >= 1, "max_waiting", self.max_waiting, accepted)
        ok = self.context is None or self.context >= 2
        require(ok, "context", self.context, "a whole number of at least 2, or null")


@shows_messages
def serve(config: ServeConfig) -> None:
    """Serves a model until Ctrl-C.

    Args:
        config: the model, and where to listen.

    Raises:
        FileNotFoundError: no such model.
        ValueError: invalid settings, a missing package, or a cache that does not fit.
        OSError: the address cannot be used.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'serve needs {" and ".join(missing)}; `pip install "irqlora-jax[serve]"` installs it'
        )
    key = _read_key(config.api_key)
    with _listen(config) as listening:
        with progress_bar("Loading the model"):
            run = load_run(config.run, adapter=not config.baseline, checkpoint=config.checkpoint)
            make_rows = _rows_of(run, config)
        service = start_service(run, make_rows, config.name, config.max_waiting)
        try:
            _listen_for_requests(service, key, config, listening)
        finally:
            service.worker.stop()
            service.worker.join(10)


def start_service(
    run: Run, make_rows: Callable[[], Rows], name: str | None = None, max_waiting: int = 64
) -> Service:
    """Starts the worker of a model.

    Args:
        run: the model.
        make_rows: makes empty rows for it.
        name: of the model (default: the name of its folder).
        max_waiting: while so many texts wait, requests are refused.
    """
    llama = run.model.config
    worker = Worker(make_rows, llama.eos_token_ids)
    return Service(
        name=name or Path(run.folder).absolute().name,
        tokenizer=run.tokenizer,
        style=find_style(run.config, run.tokenizer),
        vocabulary=llama.vocab_size,
        context=worker.slots,
        worker=worker,
        max_waiting=max_waiting,
    )


def _rows_of(run: Run, config: ServeConfig) -> Callable[[], Rows]:
    """Returns a function that makes rows whose programs are compiled."""
    fast = unpacked(run, each_layer=True)
    slots = config.context or run.model.config.max_position_embeddings

    def make() -> Rows:
        decoding = fast.model, fast.variables
        try:
            rows = Rows(run.model, run.variables, config.max_batch, slots, decoding)
            with progress_bar("Compiling the decoder"):
                rows.start(0, [0], Sampling())
                rows.step()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"max_batch = {config.max_batch}, context = {config.context}: the cache does not "
                "fit into the memory; expected smaller numbers"
            ) from None
        return rows

    return make


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:  # the value may be the key itself, so it is not shown
        raise ValueError(
            "api_key: no environment variable of this name is set; expected the name of a variable "
            "that holds the key"
        )
    return key


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise OSError(
            f"host = {config.host!r}, port = {config.port}: cannot listen ({error.strerror}); "
            "expected an address of this machine and a free port (0: any)"
        ) from None


def _listen_for_requests(
    service: Service, key: str | None, config: ServeConfig, listening: socket.socket
) -> None:
    import uvicorn

    from irqlora_jax.serve.app import make_app

    class Server(uvicorn.Server):
        """On a signal, the worker ends all texts, so the server need not wait for connections."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            service.worker.stop()
            super().handle_exit(sig, frame)

    settings = uvicorn.Config(
        make_app(service, key),
        log_config=None,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    port = listening.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    if config.host not in _LOCAL and key is None:
        logger.warning(f"host = {config.host}: other machines can use the model; api_key = null")
    logger.info(
        f"{service.name} at http://{host}:{port}/v1, {config.max_batch} texts of up to "
        f"{service.context} tokens at a time (cache: {readable_size(service.worker.cache_bytes)}). "
        "Ctrl-C ends it"
    )
    try:
        Server(settings).run(sockets=[listening])
    except KeyboardInterrupt:
        logger.info("stopped")
