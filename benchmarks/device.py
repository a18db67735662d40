# SPDX-License-Identifier: Apache-2.0
"""How a time on a CUDA device is made: events around the replay of a CUDA graph.

A contestant is captured in a graph, so that what is timed is the device's work and not Python's;
one that cannot be captured is launched as it is, and its row says so. Before each replay, outside
the events, a large copy overwrites the L2: a *cold* replay finds nothing there. Before a *warm* one
the contestant runs once more. The copy takes longer than queueing what follows, so the device does
not wait for the host between the events; timed like the rest, it also gives the bandwidth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Contestant

CACHES = ("cold", "warm")
LEAST_COPY = 256 << 20  # bytes; 0.1 ms and more on any card


@dataclass(frozen=True)
class Program:
    """What is timed. `run` queues its work and returns the answer, which is there when the work
    is done; `how` is "graph", or "launches" and the reason why there is no graph.
    """

    run: Callable[[], Any]
    how: str


def captured(function: Callable[[], Any], warm_ups: int = 3) -> Program:
    """A CUDA graph of `function`, or the function itself where it cannot be captured."""
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):  # compiles, and allocates what is kept
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            answer = function()
    except RuntimeError as error:  # what torch raises for every error of CUDA
        torch.cuda.set_stream(before)  # a capture that fails may leave its own
        torch.cuda.synchronize()
        return Program(function, f"launches: {str(error).splitlines()[0]}")

    def replay() -> Any:
        graph.replay()
        return answer

    return Program(replay, "graph")


@dataclass(frozen=True)
class Copy:
    """A copy of `bytes` from one half of a buffer to the other, which the L2 cannot hold."""

    source: torch.Tensor
    target: torch.Tensor

    @classmethod
    def make(cls) -> "Copy":
        """Each half at least four times the L2."""
        size = max(LEAST_COPY, 4 * torch.cuda.get_device_properties().L2_cache_size)
        source, target = torch.zeros(2, size, dtype=torch.uint8, device="cuda")
        return cls(source, target)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.source.numel() + self.target.numel()

    def run(self) -> None:
        """Queue it."""
        self.target.copy_(self.source)


def timed_event() -> Any:
    """An event that knows when it was reached."""
    return torch.cuda.Event(enable_timing=True)


def clock(
    run: Callable[[], Any], before: Callable[[], Any], event: Callable[[], Any] = timed_event
) -> Contestant:
    """Times one `run` between two events; what `before` queues is not timed."""

    def measure(_: int) -> float:
        begin, end = event(), event()
        before()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3  # from milliseconds

    return measure


def clocks(
    programs: dict[str, Program], copy: Copy, cache: str, event: Callable[[], Any] = timed_event
) -> dict[str, Contestant]:
    """A clock for each program, and for the copy itself, by its name."""

    def before(program: Program) -> Callable[[], None]:
        def overwrite() -> None:
            copy.run()
            if cache == "warm":
                program.run()

        return overwrite

    found = {name: clock(one.run, before(one), event) for name, one in programs.items()}
    return {**found, "copy": clock(copy.run, copy.run, event)}
