"""Keys and values that grow in place: room for all positions is taken once; transformers' cache copies all at each."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class Room(DynamicLayer):  # type: ignore[no-untyped-call]
    """One block's keys and values, each (rows, heads, `size`, head width); the first `filled` positions are in use."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size

    def take(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        """Use these tensors as the room."""
        self.room = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.show(filled)

    def show(self, filled: int) -> None:
        """Let attention see the first `filled` positions."""
        self.keys, self.values = (part[:, :, :filled] for part in self.room)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_more: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what is new behind what is there and return all."""
        if not self.is_initialized:
            shape = (*key_states.shape[:2], self.size)
            self.take(
                key_states.new_empty(*shape, key_states.shape[3]),
                value_states.new_empty(*shape, value_states.shape[3]),
                0,
            )
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for part, states in zip(self.room, (key_states, value_states), strict=True):
            part[:, :, start:end] = states
        self.show(end)
        return self.room[0][:, :, :end], self.room[1][:, :, :end]


def states_of(cache: Any) -> list[torch.Tensor]:
    """Return block 0's keys, block 0's values, block 1's keys, ...: each (rows, heads, positions, head width)."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def rooms(states: Sequence[torch.Tensor], filled: int) -> Cache:
    """Return a cache of keys and values in the order of `states_of`, the first `filled` positions in use."""
    layers = []
    for keys, values in zip(states[::2], states[1::2], strict=True):
        layers.append(Room(keys.shape[2]))
        layers[-1].take(keys, values, filled)
    return Cache(layers=[*layers])


def empty_rooms(blocks: int, size: int) -> Cache:
    """Return a cache for `size` positions of `blocks` blocks. Memory is taken when the first are written."""
    return Cache(layers=[Room(size) for _ in range(blocks)])


def show(cache: Cache, filled: int) -> None:
    """Let attention see the first `filled` positions of rooms; what comes next is written behind them."""
    for layer in cache.layers:
        assert isinstance(layer, Room)
        layer.show(filled)
