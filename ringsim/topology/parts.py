"""What a machine is made of: devices, links, and the transports that move messages over them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic

from ..errors import TopologyError
from .figures import (
    Bandwidth,
    Count,
    Dtype,
    Fraction,
    Name,
    Points,
    Positive,
    Rate,
    Share,
    Size,
    Source,
    Strict,
    Switch,
    Time,
    Units,
    Whole,
)

Progress = Literal["offload", "handshake", "thread", "polling"]
Drives = Literal["receiver", "sender", "both"]
Duplex = Annotated[Positive, pydantic.Field(ge=1, le=2)]


class MicroTile(Strict):
    """Micro-tile sizes in rows: the lowering that the efficiencies were measured with. `exact`: visible pairs alone."""

    q_rows: Whole
    k_rows: Whole
    edge_rows: Whole
    exact: Switch = False


class Backward(Strict):
    """What attention's gradients cost, as `Attention` has it; what it leaves out is as there.

    Efficiencies are those of 2 x (3 head_dim + 2 v_head_dim) FLOPs per pair: the scores anew, dp, dv, dq and dk. Of an `exact`
    kernel a block of k_rows keys goes through the queries, and finds room on a unit.
    """

    source: Source | None = None
    rate: Rate | None = None
    overhead: Time | None = None
    block_overhead: Time | None = None
    pass_bandwidth: Bandwidth | None = None
    micro_tile: MicroTile | None = None
    full: Points
    masked: Points


class Attention(Strict):
    """What attention costs for one dtype and head_dim: overhead + blocks x block_overhead + bytes / pass_bandwidth +
    FLOPs / (rate x efficiency).

    `rate` and `overhead` are by default the device's `peak` of this dtype and its `launch`. `overhead` comes once per op,
    `block_overhead` once per block of query rows of each tile and head. `pass_bandwidth` prices what is brought in and
    written back once per tile. `full` and `masked` list [pairs per micro-tile, efficiency], linear in log2(pairs) between
    points; where the micro-tile is `exact`, pairs are the visible ones of the tile. `backward` has the same of the gradients.
    """

    source: Source | None = None
    dtype: Dtype
    head_dim: Whole
    rate: Rate | None = None
    overhead: Time | None = None
    block_overhead: Time = 0.0
    pass_bandwidth: Bandwidth | None = None
    micro_tile: MicroTile
    full: Points
    masked: Points
    backward: Backward | None = None

    def of_backward(self) -> Attention:
        """The entry for gradients: with what `backward` says in place of its own; as it is where it has no such figures."""
        own = {} if self.backward is None else {name: getattr(self.backward, name) for name in Backward.model_fields}
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})


class Device(Strict):
    """cpu: `ranks` ranks share `cores`, fairly. gpu: one rank, or more if `place` says so, which then share it.

    `speed` scales its computation (a straggler has less than 1). `units` are a gpu's SMs or CUs: a fused kernel (`exact`) gives
    a block of q_rows of a head to one, so a tile keeps at most batch x heads x blocks of them busy. `egress` and `ingress`
    bound all that leaves or enters it. `inside` is the link between two ranks on it, one per pair. `matmul` is the rate that
    large matrix products achieve: it prices FLOPs that are not attention's, such as a feed-forward's.
    """

    like: Name | None = None
    source: Source | None = None
    kind: Literal["cpu", "gpu"]
    cores: Count | None = None
    ranks: Count = 1
    speed: Positive = 1.0
    units: Units | None = None
    memory: Size | None = None
    memory_bandwidth: Bandwidth
    egress: Bandwidth | None = None
    ingress: Bandwidth | None = None
    inside: Name | None = None
    launch: Time | None = None
    peak: dict[Dtype, Rate] = pydantic.Field(default_factory=dict)
    matmul: dict[Dtype, Rate] = pydantic.Field(default_factory=dict)
    attention: tuple[Attention, ...] = ()

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.kind == "cpu") != (self.cores is not None):
            raise ValueError("kind 'cpu' needs `cores`" if self.kind == "cpu" else "kind 'gpu' takes no `cores`")
        if self.kind == "cpu" and self.units is not None:
            raise ValueError("kind 'cpu' takes no `units`: it has `cores`")
        if self.kind == "gpu" and self.ranks != 1:
            raise ValueError("kind 'gpu' takes no `ranks`: it has one, unless `place` puts several on it")
        for table in self.attention:
            if table.rate is None and table.dtype not in self.peak:
                raise ValueError(f"attention for {table.dtype} has no `rate`, and `peak` has none for it")
            if table.overhead is None and self.launch is None:
                raise ValueError(f"attention for {table.dtype} has no `overhead`, and the device no `launch`")
        return self

    def rate(self, table: Attention) -> float:
        """FLOPs per second at efficiency 1."""
        return (self.peak[table.dtype] if table.rate is None else table.rate) * self.speed

    def overhead_s(self, table: Attention) -> float:
        """Seconds per op. Raises TopologyError if nothing says."""
        seconds = self.launch if table.overhead is None else table.overhead
        if seconds is None:
            raise TopologyError(f"attention for {table.dtype} has no `overhead`, and the device no `launch`")
        return seconds / self.speed


class Regime(Strict):
    """What holds for messages of `from` bytes or more, up to the next regime: a latency, and a most that one message gets."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: Size = pydantic.Field(alias="from")
    latency: Time
    bandwidth: Bandwidth | None = None


def _regimes(regimes: tuple[Regime, ...]) -> tuple[Regime, ...]:
    starts = [regime.from_ for regime in regimes]
    if regimes and (starts[0] != 0 or starts != sorted(set(starts))):
        raise ValueError("regimes begin at 0 B and increase")
    return regimes


Regimes = Annotated[tuple[Regime, ...], pydantic.AfterValidator(_regimes)]


class Link(Strict):
    """A cable, per direction. Wires carry bandwidth x achieved each way and duplex x that both ways together.

    `reverse` is the bandwidth the other way (from the switch, the NIC's network, or `to`) where it differs. `regimes` replace
    the latency and bound one message by its size.
    """

    source: Source | None = None
    bandwidth: Bandwidth
    reverse: Bandwidth | None = None
    latency: Time | None = None
    achieved: Fraction = 1.0
    duplex: Duplex = 2.0
    regimes: Regimes = ()

    @pydantic.model_validator(mode="after")
    def _one_latency(self) -> Self:
        if (self.latency is None) == (not self.regimes):
            raise ValueError("a link has either `latency` or `regimes`")
        return self


class Route(Strict):
    """How a transport does on routes that cross a link; what it leaves out is as the transport has it.

    `latency` or `regimes` hold from end to end: they replace the links' latencies and bound one message; links still share.
    """

    source: Source | None = None
    latency: Time | None = None
    bandwidth: Bandwidth | None = None
    regimes: Regimes = ()
    eager: Size | None = None
    progress: Progress | None = None
    drives: Drives | None = None
    look: Time | None = None
    device_share: Share | None = None
    slowed_by_compute: Share | None = None

    @pydantic.model_validator(mode="after")
    def _one_cost(self) -> Self:
        if self.regimes and (self.latency is not None or self.bandwidth is not None):
            raise ValueError("`regimes` say latency and bandwidth: give them or those, not both")
        return self


class Transport(Strict):
    """The MPI or NCCL stack: who moves a message once both sides have posted, and what that takes from the device.

    progress: offload (hardware, at once), handshake (hardware, once `drives` has looked), thread (a thread of the driving rank,
    on its cores), polling (the driving rank itself, inside polls and waits). `look`: how long a completion goes unnoticed by a
    rank that waits, on average. Messages up to `eager` bytes leave without the receiver. `device_share`: the part of a device
    that its kernels lose while a message moves; `slowed_by_compute`: the part of its rate that a message loses while a kernel
    runs at either end. Links in `avoid` are not used. `paths`, by link: the last listed that a route crosses decides.
    """

    source: Source | None = None
    progress: Progress
    drives: Drives = "receiver"
    look: Time = 0.0
    eager: Size = 0.0
    device_share: Share = 0.0
    slowed_by_compute: Share = 0.0
    avoid: tuple[Name, ...] = ()
    paths: dict[Name, Route] = pydantic.Field(default_factory=dict)
