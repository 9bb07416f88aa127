"""Calibration, and rings by the real executor, on timed paper GPUs."""

from timed_gpu import World, backend_of, matmul_of

from ringsim import topology
from ringsim.calibration import to_yaml
from ringsim.device_calibration import Subject, measure_devices
from ringsim.device_topology import describe
from ringsim.execution import Rank
from ringsim.kernel_times import Kernel

RATE = 5e12
PRODUCTS = 4e12
KERNEL = Kernel(dtype="bfloat16", head_dim=64)
TRUTH = """
ringsim: 2
name: truth
source: "defined: for a test"
devices: {gpu: {kind: gpu, units: 8, memory: 4 GB, memory_bandwidth: 100 GB/s, launch: 8 us, inside: within}}
links: {within: {bandwidth: 20 GB/s, latency: 10 us}, wire: {bandwidth: 4 GB/s, latency: 4 us}}
machine: {join: switch, link: wire, count: 2, of: gpu}
transports: {paper: {progress: offload, look: 20 us, device_share: 0.1, slowed_by_compute: 0.2}}
"""
ONE_DEVICE = TRUTH.replace("{join: switch, link: wire, count: 2, of: gpu}", "gpu").replace(
    "progress: offload", "progress: handshake, drives: sender"
)


def sharing(text, place):
    """The same machine with its ranks on these devices."""
    return f"{text}place: {place}\n"


def subject_of(endpoint, **tiles):
    """What a rank of a World calibrates."""
    calls, make_backend = backend_of(endpoint, RATE, **tiles)
    return Subject(transport=endpoint, make_backend=make_backend, facts=calls.facts(), matmul=matmul_of(calls, PRODUCTS))


def calibrated(truth, world_size, **world):
    """What calibration writes of a machine, as plain values: rank 0's."""

    def run(endpoint):
        subject = subject_of(endpoint)
        found = measure_devices(subject, [KERNEL])
        return describe(found, endpoint, [KERNEL], subject.facts, "transport paper: it is all there is")

    values = World(topology.parse(truth), world_size, **world).run(run)
    assert all(one["devices"] == values[0]["devices"] and one["links"] == values[0]["links"] for one in values)
    return values[0]


def machine(values):
    """The topology that calibration wrote."""
    return topology.parse(to_yaml(values), "calibrated")


def ring_s(truth, schedule, **world):
    """Seconds that a schedule takes by the real executor and backend on a machine, from a barrier to its last rank's end."""

    def run(endpoint):
        calls, make_backend = backend_of(endpoint, RATE)
        backend = make_backend()
        rank = Rank(schedule, endpoint, backend)
        arrays = [backend.new(shape, rank.dtype(name)) for name, shape in rank.shapes().items()]
        endpoint.barrier()
        begun_s = endpoint.world.env.now
        rank.run(*arrays)
        calls.synchronize(calls.record(backend.stream))
        return begun_s, endpoint.world.env.now

    spans = World(topology.parse(truth), schedule.world_size, **world).run(run)
    return max(end_s for _, end_s in spans) - min(begun_s for begun_s, _ in spans)
