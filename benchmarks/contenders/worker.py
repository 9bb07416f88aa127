"""What every contender's process does: read its rows, obey the driver, time itself. Needs NumPy alone.

The driver (benchmarks/peers.py) starts each rank with PEERS (a JSON object: shape, rank, folder, socket, ...) in its
environment. A rank reads its rows of q, k, v and dout from raw float32 files, so that it never holds the whole arrays, and
then answers the driver's requests over a Unix socket; between requests it sleeps in a read and uses no processor.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
"""Where launchers of MPI say who a process is."""

Array = np.ndarray[Any, np.dtype[np.float32]]
Spans = list[tuple[int, int]]
"""Runs of the sequence, [begin, end), that a rank holds, in its order."""


@dataclass
class Task:
    """What the driver asks of this process."""

    rank: int
    world_size: int
    seq: int
    heads: int
    head_dim: int
    folder: str
    socket: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Task:
        """From the environment; `rank` is there too, or is the launcher's to say."""
        given = json.loads(os.environ["PEERS"])
        rank = given.pop("rank", None)
        if rank is None:
            rank = next(int(os.environ[name]) for name in RANKS if name in os.environ)
        return cls(rank=rank, **given)

    def contiguous(self) -> Spans:
        """One run per rank."""
        rows = self.seq // self.world_size
        return [(self.rank * rows, (self.rank + 1) * rows)]

    def zigzag(self) -> Spans:
        """Runs r and 2P-1-r of 2P."""
        rows, last = self.seq // (2 * self.world_size), 2 * self.world_size - 1
        return [(run * rows, (run + 1) * rows) for run in (self.rank, last - self.rank)]

    def rows(self, name: str, spans: Spans) -> Array:
        """These rows of q, k, v or dout, (1, rows, heads, head_dim)."""
        width = self.heads * self.head_dim
        path = Path(self.folder) / f"{name}.f32"
        parts = [np.fromfile(path, np.float32, (end - begin) * width, offset=begin * width * 4) for begin, end in spans]
        return np.concatenate(parts).reshape(1, -1, self.heads, self.head_dim)


@dataclass
class Contender:
    """One rank of a peer, ready to run; `backward` also runs the forward, and is None where the peer has none.

    Both return arrays (1, rows, heads, head_dim): out, and out, dq, dk, dv. What they return is kept until the next call only.
    """

    spans: Spans
    forward: Callable[[], dict[str, Any]]
    backward: Callable[[], dict[str, Any]] | None
    barrier: Callable[[], object]
    as_numpy: Callable[[Any], Array]
    facts: dict[str, Any]


def resident(name: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> bool:
    """Set the peak of resident memory to what is resident now; whether the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def timed(contender: Contender, call: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float, float]:
    """One call after a barrier: its results, wall seconds, and processor seconds of all threads of this process."""
    contender.barrier()
    start_cpu_s, start_s = time.process_time(), time.perf_counter()
    results = call()
    return results, time.perf_counter() - start_s, time.process_time() - start_cpu_s


def answer(contender: Contender, request: dict[str, Any], base: int, task: Task) -> dict[str, Any]:
    """Run what is asked for `calls` times; write the last results where `keep` is set."""
    call = contender.forward if request["pass"] == "forward" else contender.backward
    if call is None:
        return {"missing": True}
    seconds, cpu_s, results = [], [], {}
    for _ in range(request["calls"]):
        # the last results go first: no two calls' arrays at once
        results = {}
        results, wall_s, used_s = timed(contender, call)
        seconds.append(wall_s)
        cpu_s.append(used_s)
    reply = {"seconds": seconds, "cpu_s": cpu_s, "peak_nbytes": resident("VmHWM") - base}
    if request.get("keep"):
        for name, array in results.items():
            path = Path(task.folder) / f"{request['keep']}-{name}-{task.rank}.f32"
            np.ascontiguousarray(contender.as_numpy(array)).tofile(path)
        reply["names"] = sorted(results)
    return reply


def serve(prepare: Callable[[Task], Contender]) -> None:
    """Prepare, then answer requests until the driver closes the socket. Call it when all imports are done."""
    task = Task.read()
    reset = forget_peak()
    base = resident("VmRSS")
    contender = prepare(task)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(task.socket)
        stream = link.makefile("rw")
        hello = {
            "rank": task.rank,
            "pid": os.getpid(),
            "spans": contender.spans,
            "facts": contender.facts,
            "peak_was_reset": reset,
        }
        stream.write(json.dumps(hello) + "\n")
        stream.flush()
        for line in stream:
            stream.write(json.dumps(answer(contender, json.loads(line), base, task)) + "\n")
            stream.flush()
