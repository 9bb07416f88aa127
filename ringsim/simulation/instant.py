"""The end of an instant: what happens at one time is seen together, whatever the order in which it was processed."""

from __future__ import annotations

import simpy
from simpy.events import EventPriority

LAST = EventPriority(2)


def rest(env: simpy.Environment) -> simpy.Event:
    """Fires at this very time, after all else that is due at it."""
    event = simpy.Event(env)
    event._ok, event._value = True, None
    env.schedule(event, priority=LAST)
    return event
