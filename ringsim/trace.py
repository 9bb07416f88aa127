"""Chrome trace events of timelines, for Perfetto: each timeline a process group, each rank a thread, hops as async spans."""

from __future__ import annotations

from typing import Any

from .timeline import POSTS, Event, Timeline


def trace_events(timelines: dict[str, Timeline]) -> dict[str, Any]:
    """The trace of named timelines on one axis (microseconds), as the JSON object format of the Trace Event specification."""
    events: list[dict[str, Any]] = []
    for pid, (name, timeline) in enumerate(timelines.items(), 1):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        for rank in range(timeline.world_size):
            events.append({"ph": "M", "pid": pid, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        for event in timeline.events:
            events.extend(_post(pid, event) if event.kind in POSTS else [_span(pid, event)])
    digests = {name: timeline.digest for name, timeline in timelines.items()}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"digests": digests}}


def _span(pid: int, event: Event) -> dict[str, Any]:
    seconds = {name: getattr(event, name) for name in ("cpu_s", "poll_s", "late_s", "transfer_s", "progress_s")}
    return {
        "ph": "X",
        "pid": pid,
        "tid": event.rank,
        "name": event.kind,
        "cat": event.phase,
        "ts": event.start_s * 1e6,
        "dur": event.duration_s * 1e6,
        "args": {"op": event.op, "step": event.step} | {name: value for name, value in seconds.items() if value},
    }


def _post(pid: int, event: Event) -> list[dict[str, Any]]:
    to_from = "to" if event.kind == "send" else "from"
    common = {
        "pid": pid,
        "tid": event.rank,
        "cat": "hop",
        "id": f"{pid}.{event.rank}.{event.op}",
        "name": f"{event.kind} {to_from} {event.peer}",
    }
    args = {"op": event.op, "step": event.step, "nbytes": event.nbytes, "tag": event.tag}
    return [{"ph": "b", "ts": event.start_s * 1e6, "args": args, **common}, {"ph": "e", "ts": event.end_s * 1e6, **common}]
