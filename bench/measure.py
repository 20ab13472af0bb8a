"""What a measurement is, and the process of its own that each side of it gets."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import OlmoConfig


@dataclass
class Side:
    """What one side took and gave."""

    seconds: dict[str, float] = field(default_factory=dict)  # by the name of what was timed
    values: dict[str, Any] = field(default_factory=dict)  # results, to be compared
    peak: int = 0  # bytes resident, at most, in the whole life of the process

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the body takes to `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Measurement:
    """A line of the table. Seconds (or bytes), ours and the reference's, and how far the results are apart."""

    name: str
    shape: str
    ours: float
    reference: float
    goal: str
    equality: str
    peak_ours: int
    peak_reference: int

    @property
    def ratio(self) -> float:
        """How many times as much the reference takes."""
        return self.reference / self.ours


def olmo(vocabulary: int, width: int, intermediate: int, blocks: int, heads: int, end: int) -> OlmoConfig:
    """Return the config of a model of the organisers' kind."""
    return OlmoConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        eos_token_id=end,
        pad_token_id=1,
        bos_token_id=None,
    )


def alone(side: Callable[..., Side], *arguments: Any) -> Side:
    """Run one side in a fresh process, so that neither its memory nor its warmth comes from the other."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_run, side, arguments).result()


def _run(side: Callable[..., Side], arguments: tuple[Any, ...]) -> Side:
    result = side(*arguments)
    result.peak = _peak()
    return result


def _peak() -> int:
    """Return the process's peak resident memory in bytes. (getrusage's survives exec: it may be the parent's.)"""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def relative(ours: list[float], reference: list[float]) -> float:
    """Return the largest relative difference of two lists of the same length."""
    if len(ours) != len(reference) or not ours:
        raise ValueError(f"{len(ours)} values against {len(reference)}")
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, reference, strict=True))
