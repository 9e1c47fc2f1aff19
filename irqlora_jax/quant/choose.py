"""Chooses the implementation of a matrix product, an ICQ search or attention: XLA or a kernel."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: the name by which users request it.
        refusal: takes the operands. Returns one sentence that says why this implementation cannot
            serve them (device, shape, format or version of jax), or None if it can.
        forward: computes the operation.
        backward: computes the gradient; None if jax derives it.
        is_faster: takes the operation and the operands. Returns whether this implementation was
            measured to be faster than XLA's. If not, it is used only on request.
        takes_updates: for products: it applies `QTensor.shift_update` itself. Else the product
            with sums of x over blocks is added to its result.
    """

    name: str
    refusal: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    is_faster: Callable[..., bool] = lambda *_: True
    takes_updates: bool = False


def serves_all(*_: Any) -> None:
    """The `refusal` of an implementation that can serve all operands."""


def kernel(name: str, module: str, *functions: str, place: Callable[..., tuple]) -> Implementation:
    """An implementation in `kernels/`. Its module is imported only when a function is called.

    Args:
        name: the name by which users request it.
        module: name of the file; it has a function `refusal`.
        *functions: names of its functions for `forward` and, if there is one, `backward`.
        place: takes the operands; returns format, shape and rows, by which `is_faster` looks the
            kernel up in `kernels/measured.json`.
    """

    def function(attribute: str) -> Callable[..., Any]:
        def call(*operands: Any, **options: Any) -> Any:
            imported = importlib.import_module(f"irqlora_jax.kernels.{module}")
            return getattr(imported, attribute)(*operands, **options)

        return call

    def is_faster(operation: str, *operands: Any) -> bool:
        from irqlora_jax.kernels import measured  # type: ignore

        kind = jax.devices()[0].device_kind
        return measured.is_faster(operation, name, kind, *place(*operands))

    return Implementation(name, *map(function, ("refusal", *functions)), is_faster=is_faster)


def choose(
    name: str | None,
    implementations: Sequence[Implementation],
    *operands: Any,
    operation: str = "",
    setting: str = "implementation",
    served: str = "here",
) -> Implementation:
    """Returns the implementation of this name, or else the first that is faster and can serve.

    Args:
        name: the requested name, or None.
        implementations: the preferred ones first. The last one serves all operands.
        *operands: arguments of `refusal` and `is_faster`.
        operation: first argument of `is_faster`, as in `kernels/measured.json`.
        setting: name of the argument or option, for the message.
        served: what is computed and where, for the message.

    Raises:
        ValueError: the implementation does not exist or cannot serve; the message says why, and
            which ones can.
    """
    if name is None:
        return next(
            one
            for one in implementations
            if one.is_faster(operation, *operands) and one.refusal(*operands) is None
        )
    by_name = {one.name: one for one in implementations}
    if name not in by_name:
        reason = "there is no such implementation"
    elif (reason := by_name[name].refusal(*operands)) is None:
        return by_name[name]
    able = [repr(one.name) for one in implementations if one.refusal(*operands) is None]
    raise ValueError(f"{setting} = {name!r}: {reason}; {' or '.join(able)} serves {served}")
