"""Host memory for those parts of an array that the devices of this process need."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from irqlora_jax.files.tensors import aligned

Place = tuple[slice, ...]
"""Where a part is in its array: the rows, the columns and so on."""


class Parts:
    """Host memory for those parts of an array that the devices of this process need."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, where: NamedSharding | None) -> None:
        """Allocates the parts.

        Args:
            shape: of the whole array.
            dtype: its type.
            where: devices, perhaps of several processes; None: the first device.
        """
        self._shape, self._where = shape, where
        self._devices: dict[Any, tuple[tuple[int, int], ...]] = {}
        found = {None: (slice(None),) * len(shape)}
        if where is not None:
            found = where.addressable_devices_indices_map(shape)
        self._arrays: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for device, index in found.items():
            sizes = zip(index or (), shape, strict=True)
            key = tuple((s.start or 0, size if s.stop is None else s.stop) for s, size in sizes)
            self._devices[device] = key
            if key not in self._arrays:
                self._arrays[key] = aligned(tuple(stop - start for start, stop in key), dtype)

    def spaces(self, entry: int | None = None) -> Iterator[tuple[np.ndarray, Place]]:
        """The parts to fill, each with its place; of an entry of the first axis, or of all.

        The first axis must not be split if entries are asked for.
        """
        for key, array in self._arrays.items():
            place = tuple(slice(*ends) for ends in key)
            yield (array, place) if entry is None else (array[entry, ...], place[1:])

    def put(self, value: np.ndarray, entry: int | None = None) -> None:
        """Copies the parts of an array, or of an entry of the first axis."""
        for space, place in self.spaces(entry):
            space[...] = value[place]

    def moved(self) -> jax.Array:
        """Moves the parts to the devices. Frees the host copies unless they are aliased."""
        arrays, self._arrays = self._arrays, {}
        if len(arrays) == 1 and (self._where is None or self._where.is_fully_addressable):
            (whole,) = arrays.values()
            del arrays
            return jax.block_until_ready(jax.device_put(whole, self._where, may_alias=True))
        assert self._where is not None
        parts = [
            jax.device_put(arrays[key], device, may_alias=True)
            for device, key in self._devices.items()
        ]
        del arrays
        array = jax.make_array_from_single_device_arrays(self._shape, self._where, parts)
        return jax.block_until_ready(array)
