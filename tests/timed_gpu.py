"""GPUs on paper with clocks: ranks as threads of one SimPy world, in which launches, kernels and messages take set times.

Memory is NumPy's and is never touched; only time passes. Exactly one thread runs at a time, so all is deterministic.
"""

import random
import threading
import weakref
from collections import Counter, defaultdict, deque

import numpy as np
import simpy
from timed_tiles import TimedTiles

from ringsim.backends.cupy import CupyBackend
from ringsim.errors import DeviceError
from ringsim.simulation.cores import Cores
from ringsim.simulation.wires import Wires
from ringsim.transport import Handle

NARROW_S = 1e-3
"""A rank that waits longer than this looks less often."""


class Memory(np.ndarray):
    """Device memory."""


class Fiber(threading.Thread):
    """A rank: runs while the world stands still, and the other way round."""

    def __init__(self, world, rank, function):
        super().__init__(daemon=True, name=f"rank {rank}")
        self.world, self.rank, self.function = world, rank, function
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.event = self.result = self.failure = None
        self.finished = False
        self.debt_s = 0.0

    def run(self):
        self.go.acquire()
        try:
            self.result = self.function(Endpoint(self.world, self))
        except BaseException as error:  # noqa: BLE001 - raised again where the world was started
            self.failure = error
        self.finished = True
        self.back.release()

    def wait(self, event):
        """Let the world go on until an event."""
        self.event = event
        self.back.release()
        self.go.acquire()
        if self.world.failed:
            raise SystemExit

    def settle(self):
        """Let the time pass that the host has spent."""
        debt_s, self.debt_s = self.debt_s, 0.0
        if debt_s:
            self.wait(self.world.env.timeout(debt_s))

    def process(self):
        self.start()
        while True:
            self.go.release()
            self.back.acquire()
            if self.finished:
                if self.failure is not None:
                    raise self.failure
                return
            yield self.event


class World:
    """Ranks on devices: `truth` is the topology whose paths messages take. `noise` is the relative spread of event times."""

    def __init__(self, truth, world_size, *, host_s=8e-6, kernel_s=3e-6, sharing=1.0, noise=0.0, memory_nbytes=2**31, hosts=None):
        self.truth, self.env, self.host_s, self.kernel_s = truth, simpy.Environment(), host_s, kernel_s
        self.sharing, self.noise, self.memory_nbytes = sharing, noise, memory_nbytes
        self.rng = random.Random(0)
        self.placed = truth.place(world_size)
        self.hosts = hosts or ["paper"] * world_size
        self.world_size = world_size
        cores = {device: Cores(self.env, 1.0) for device in self.placed}
        self.cores = [cores[device] for device in self.placed]
        capacities = [resource.capacity for resource in truth.graph.resources]
        self.wires = Wires(self.env, capacities, self.placed, self.cores)
        self.computing = Counter()
        self.gathers = defaultdict(dict)
        self.halves = defaultdict(deque)
        self.fibers = []
        self.failed = False

    def device(self, rank):
        return self.truth.device(self.placed[rank])

    def run(self, function):
        """`function(endpoint)` on all ranks; their results."""
        self.fibers = [Fiber(self, rank, function) for rank in range(self.world_size)]
        running = [self.env.process(fiber.process()) for fiber in self.fibers]
        try:
            self.env.run()
        except BaseException:
            self.failed = True
            for fiber in self.fibers:
                fiber.go.release()
            raise
        assert not any(process.is_alive for process in running), "ranks wait for what never comes"
        return [fiber.result for fiber in self.fibers]


class Event:
    """Complete when its stream has come so far; as often as it is recorded."""

    def __init__(self):
        self.reached, self.at_s = None, 0.0


class TimedCalls:
    """`Calls` of one rank."""

    def __init__(self, endpoint):
        self.world, self.fiber, self.endpoint = endpoint.world, endpoint.fiber, endpoint
        self.held = 0
        self.current = self.stream()

    def activate(self):
        pass

    def caller(self, stream):
        return self.current if stream is None else stream

    def clocks(self):
        return {"unknown": "it is simulated"}

    def view(self, name, value):
        return value

    def empty(self, nbytes):
        if self.held + nbytes > self.world.memory_nbytes:
            raise DeviceError(f"{nbytes} B beside {self.held} B: out of memory")
        base = np.empty(nbytes + 256, np.uint8)
        self.held += nbytes
        weakref.finalize(base, self._freed, nbytes)
        start = -base.ctypes.data % 256
        return base[start : start + nbytes].view(Memory)

    def _freed(self, nbytes):
        self.held -= nbytes

    def pooled(self, nbytes, stream=None):
        return self.empty(nbytes)

    def pinned(self, nbytes):
        return np.empty(nbytes, np.uint8)

    # streams: SimPy processes that take one thing after the other

    def stream(self):
        stream = simpy.Store(self.world.env)
        self.world.env.process(self._work(stream))
        return stream

    def _put(self, stream, kind, what):
        stream.put((self.world.env.now + self.fiber.debt_s, kind, what))

    def _work(self, stream):
        env, world, rank = self.world.env, self.world, self.fiber.rank
        while True:
            ready_s, kind, what = yield stream.get()
            if ready_s > env.now:
                yield env.timeout(ready_s - env.now)
            if kind == "wait":
                yield what
            elif kind == "record":
                event, reached = what
                event.at_s = env.now
                reached.succeed()
                self.endpoint.ring()
            else:
                device = world.placed[rank]
                world.computing[device] += 1
                world.wires.computing(rank, 1)
                share = world.sharing if world.computing[device] > 1 else 1.0
                yield world.cores[rank].start(what / share).done
                world.wires.computing(rank, -1)
                world.computing[device] -= 1

    def record(self, stream, event=None):
        event = event or Event()
        event.reached = self.world.env.event()
        self._put(stream, "record", (event, event.reached))
        return event

    def wait(self, stream, event):
        self._put(stream, "wait", event.reached)

    def done(self, event):
        # as of when this rank last let time pass: whoever asks in a loop polls its transport, too
        return event.reached.processed

    def synchronize(self, event):
        self.fiber.settle()
        if not event.reached.processed:
            self.fiber.wait(event.reached)

    def elapsed_s(self, first, last):
        return (last.at_s - first.at_s) * (1 + self.world.rng.gauss(0, 1) * self.world.noise)

    # work

    def work(self, seconds, stream):
        """Queue a kernel of so many seconds of the whole device."""
        self.fiber.debt_s += self.world.host_s
        self._put(stream, "kernel", self.world.kernel_s + seconds)

    def copy(self, target, source, stream):
        assert target.nbytes == source.nbytes

    def fill(self, target, byte, stream):
        self._pass(target.nbytes, stream)

    def _pass(self, nbytes, stream):
        self.work(nbytes / self.world.device(self.fiber.rank).memory_bandwidth, stream)

    def launch(self, kernel, shape, arguments, stream):
        """A pass over the arrays; the first is read and written where it is summed into."""
        nbytes = [one.nbytes for one in arguments if isinstance(one, Memory)]
        twice = nbytes[0] if kernel.name.startswith("accumulate") else 0
        self._pass(sum(nbytes) + twice, stream)

    def facts(self):
        return {
            "device": "Paper GPU 100",
            "units": self.world.device(self.fiber.rank).units,
            "memory_nbytes": self.world.memory_nbytes,
            "uuid": f"{self.world.placed[self.fiber.rank]:032x}",
            "cuda_driver": 13000,
            "nvrtc": (13, 0),
        }


class Endpoint:
    """A rank's end of the world: a transport of device memory whose paths are the truth's."""

    name = "paper"
    library = "paper"
    declared_share = None

    def __init__(self, world, fiber):
        self.world, self.fiber, self.rank, self.world_size = world, fiber, fiber.rank, world.world_size
        self.hosts, self.failure = world.hosts, None
        transport = world.truth.transport
        self.progress, self.drives = transport.progress, transport.drives
        self.device_share = self.declared_share
        self.rounds = 0
        self.pending, self.matched = [], []
        self.bell = world.env.event()

    def ring(self):
        bell, self.bell = self.bell, self.world.env.event()
        bell.succeed()

    def isend(self, data, peer, tag):
        return self._post(data, (self.rank, peer, tag), True)

    def irecv(self, data, peer, tag):
        return self._post(data, (peer, self.rank, tag), False)

    def _post(self, data, key, sends):
        self.fiber.debt_s += self.world.host_s / 4
        self.fiber.settle()
        env = self.world.env
        half = (Handle(posted_s=env.now), data.nbytes, env.event(), self)
        self.pending.append(half)
        mine, other = self.world.halves[(*key, sends)], self.world.halves[(*key, not sends)]
        if not other:
            mine.append(half)
            return half[0]
        match = other.popleft()
        assert match[1] == half[1], "halves differ in size"
        pair = (half, match) if sends else (match, half)
        if self.progress == "handshake":
            driver = pair[0 if self.drives == "sender" else 1][3]
            driver.matched.append((pair, key))
            driver.ring()
        else:
            self._carry(pair, key)
        return half[0]

    def _carry(self, pair, key):
        world = self.world
        path = world.truth.path(world.placed[key[0]], world.placed[key[1]])

        def moved():
            for _, _, event, end in pair:
                event.succeed()
                end.ring()

        world.wires.carry(path, key[0], key[1], pair[0][1], moved)

    def poll(self):
        self.fiber.debt_s += 2e-7
        self.fiber.settle()
        matched, self.matched = self.matched, []
        for pair, key in matched:
            self._carry(pair, key)
        for handle, _, event, _ in self.pending:
            if event.triggered:
                handle.done_s = self.world.env.now
        self.pending = [half for half in self.pending if not half[0].done]

    def idle(self, attempt):
        """Sleep until something happens to this rank."""
        if self.matched or any(half[2].triggered for half in self.pending):
            return
        began_s = self.world.env.now
        self.fiber.wait(self.bell)
        if self.world.env.now - began_s > NARROW_S:
            self.fiber.debt_s += self.world.truth.transport.look

    def allgather(self, value):
        self.fiber.debt_s += 5e-6
        self.fiber.settle()
        self.rounds += 1
        held = self.world.gathers[self.rounds]
        if not held:
            held["all"] = self.world.env.event()
        held[self.rank] = value
        if len(held) == self.world_size + 1:
            held["all"].succeed()
        else:
            self.fiber.wait(held["all"])
        return [held[rank] for rank in range(self.world_size)]

    def barrier(self):
        self.allgather(None)

    def close(self):
        pass


def backend_of(endpoint, rate, **tiles):
    """A function that makes the real backend over a rank's timed device."""
    calls = TimedCalls(endpoint)
    units = endpoint.world.device(endpoint.rank).units
    return calls, lambda: CupyBackend(calls, (TimedTiles(rate, units, calls.work, **tiles),))


def matmul_of(calls, rate):
    """Matrix products at a set rate."""

    def matmul(a, b, c, stream):
        calls.work(2 * c.shape[0] ** 3 / rate, stream)

    return matmul
