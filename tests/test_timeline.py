"""Timelines, their comparison and their traces."""

import json

import pytest

from ringsim import topology
from ringsim.comparison import compare, relative_error
from ringsim.errors import ComparisonError
from ringsim.execution import clock
from ringsim.schedule import Schedule
from ringsim.simulation import simulate
from ringsim.timeline import Event, Timeline, gather
from ringsim.trace import trace_events
from ringsim.workload import Workload


def event(rank, op, kind, start_s, end_s, **more):
    defaults = {"step": 0, "phase": "hop"}
    return Event(rank=rank, op=op, kind=kind, start_s=start_s, end_s=end_s, **(defaults | more))


def timeline(events, digest="d", world_size=2):
    return Timeline(source="measured", digest=digest, world_size=world_size, events=tuple(events))


def exchange(*, send_at, wait_from, wait_to, origin=0.0):
    """Rank 1 waits for one message that rank 0 posts at `send_at`."""
    times = [origin + t for t in (send_at, wait_from, wait_to)]
    sender = timeline([event(0, 0, "attend", origin, times[0]), event(0, 1, "send", times[0], times[2], peer=1, tag=3)])
    receiver = timeline(
        [
            event(1, 0, "attend", origin, times[1], poll_s=0.25),
            event(1, 1, "recv", origin, times[2], peer=0, tag=3),
            event(1, 2, "wait", times[1], times[2]),
        ]
    )
    return [sender, receiver]


@pytest.mark.parametrize(
    ("send_at", "late", "transfer"),
    [(4.0, 2.0, 1.0), (1.0, 0.0, 3.0), (5.0, 3.0, 0.0), (2.0, 0.0, 3.0)],
)
def test_a_measured_wait_is_split_at_the_peers_post(send_at, late, transfer):
    joined = gather(exchange(send_at=send_at, wait_from=2.0, wait_to=5.0, origin=100.0))
    wait = next(e for e in joined.events if e.kind == "wait")
    assert (wait.late_s, wait.transfer_s) == pytest.approx((late, transfer))
    assert min(e.start_s for e in joined.events) == 0
    assert joined.total_s == 5.0
    assert joined.exposed_s() == pytest.approx((transfer + 0.25) / 2)
    assert joined.late_s() == pytest.approx(late / 2)
    assert joined.compute_s() == pytest.approx((send_at + 2.0 - 0.25) / 2)


def test_messages_of_one_channel_match_first_in_first_out():
    sends = [event(0, i, "send", t, 10.0, peer=1, tag=0) for i, t in enumerate((1.0, 6.0))]
    recvs = [event(1, i, "recv", 0.0, t, peer=0, tag=0) for i, t in enumerate((4.0, 8.0))]
    waits = [event(1, 2, "wait", 2.0, 4.0), event(1, 3, "wait", 5.0, 8.0)]
    # events come in the order of their records: a post is recorded by the wait that completes it
    joined = gather([timeline(sends), timeline([recvs[0], waits[0], recvs[1], waits[1]])])
    assert [(e.late_s, e.transfer_s) for e in joined.events if e.kind == "wait"] == [(0.0, 2.0), (1.0, 2.0)]


def test_steps_add_up_to_each_ranks_total():
    events = [event(0, 0, "a", 0, 2), event(0, 1, "wait", 2, 3, step=1), event(0, 2, "a", 3, 7, step=1), event(1, 0, "a", 1, 4)]
    found = timeline(events).steps()
    assert [step.latency_s for step in found] == [(2 + 4) / 2, 5 / 2]
    assert [step.slowest_s for step in found] == [4, 5]
    assert timeline(events).total_s == 7
    assert timeline([]).total_s == 0
    assert timeline([]).steps() == ()


def test_round_trip_through_json():
    joined = gather(exchange(send_at=4.0, wait_from=2.0, wait_to=5.0))
    values = json.loads(json.dumps(joined.to_dict()))
    assert Timeline.from_dict(values) == joined
    assert values["total_s"] == joined.total_s


def test_different_schedules_are_neither_joined_nor_compared():
    with pytest.raises(ComparisonError, match="different schedules"):
        gather([timeline([], "a"), timeline([], "b")])
    with pytest.raises(ComparisonError, match="differ"):
        compare(timeline([], "a"), timeline([], "b"))
    with pytest.raises(ComparisonError, match="nothing was measured"):
        compare(timeline([]), [])


def test_comparison_takes_medians_and_shows_the_range():
    runs = [timeline([event(0, 0, "attend", 0, t), event(0, 1, "wait", t, t + 1, transfer_s=1.0, step=1)]) for t in (4, 6, 5)]
    predicted = timeline([event(0, 0, "attend", 0, 6), event(0, 1, "wait", 6, 9, transfer_s=3.0, step=1)])
    result = compare(predicted, runs)
    assert (result.total.low_s, result.total.median_s, result.total.high_s) == (5, 6, 7)
    assert result.error == 9 / 6 - 1
    assert [step.error for step in result.steps] == pytest.approx([6 / 5 - 1, 2.0])
    facts = result.to_dict()
    assert facts["predicted"]["total_s"] == 9
    assert facts["measured"]["total_s"] == 6
    assert facts["measured"]["spread"]["total_s"] == [5, 7]
    assert facts["measured"]["samples_total_s"] == [5, 7, 6]
    assert facts["error"] == {"total": 0.5}
    assert [step["step"] for step in facts["steps"]] == [0, 1]
    json.dumps(facts)


def test_relative_error():
    assert relative_error(3, 2) == 0.5
    assert relative_error(0, 0) == 0
    assert relative_error(1, 0) == float("inf")


def test_trace_has_a_process_per_timeline_and_a_thread_per_rank():
    schedule = Schedule(workload=Workload(q_len=512, head_dim=128, dtype="bfloat16"), world_size=3)
    predicted = simulate(schedule, topology.load("ideal"))
    trace = trace_events({"predicted": predicted, "measured": predicted})
    events = trace["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"predicted", "measured"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == {(p, t) for p in (1, 2) for t in range(3)}
    begun, ended = ([e["id"] for e in events if e["ph"] == phase] for phase in "be")
    assert sorted(begun) == sorted(ended)
    assert len(set(begun)) == len(begun) == 2 * sum(e.kind in ("send", "recv") for e in predicted.events)
    longest = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert longest == pytest.approx(predicted.total_s * 1e6)
    json.dumps(trace)


def test_skewed_clocks_are_put_on_one_axis():
    import time

    from ringsim.backends.loopback import spawn

    skews = [0.0, 1234.5, -77.25]

    def offset(endpoint):
        return clock.offsets(endpoint, lambda: time.perf_counter() + skews[endpoint.rank])

    found = spawn(3, offset)
    for skew, one in zip(skews, found, strict=True):
        assert abs(one.offset_s - skew) <= one.error_s + 1e-9
    shifted = clock.shift(timeline([event(1, 0, "attend", 1235.5, 1236.5)]), found[1])
    assert shifted.events[0].start_s == pytest.approx(1.0, abs=found[1].error_s + 1e-9)
    assert shifted.facts["clock_error_s"] == found[1].error_s
    drifted = clock.Offset(2.0, 0.1, 9.0).mine(clock.Offset(1.0, 0.2, 0.0))
    assert (drifted.offset_s, drifted.error_s) == (1.5, pytest.approx(0.2 + 0.5))
    assert clock.offsets(spawn(1, lambda endpoint: endpoint)[0]).offset_s == 0
