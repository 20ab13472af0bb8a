"""Keys and values that grow in place: room for all positions is taken once; transformers' cache copies all at each."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class Room(DynamicLayer):  # type: ignore[no-untyped-call]
    """One block's keys and values, each (rows, heads, room, head width); the first `filled` positions are in use."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
    return Cache(layers=[Room(keys, values, filled) for keys, values in zip(states[::2], states[1::2], strict=True)])
