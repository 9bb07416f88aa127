"""Cores shared by runnable jobs, fairly: n jobs on C cores each run at min(1, C/n), less what messages take from the device."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count

import simpy


@dataclass(slots=True)
class Job:
    """Work in core seconds; `done` fires when it is finished."""

    work_s: float
    done: simpy.Event
    begin: float
    end: float
    active: bool = field(default=True)


class Cores:
    """Egalitarian processor sharing in virtual time: the service that a job receives is the same for all, so one heap serves."""

    def __init__(self, env: simpy.Environment, capacity: float) -> None:
        self._env = env
        self._capacity = capacity
        self._speed = 1.0
        self._virtual = 0.0
        self._since = 0.0
        self._running = 0
        self._heap: list[tuple[float, int, Job]] = []
        self._order = count()
        self._alarm = 0

    def start(self, work_s: float) -> Job:
        """Begin a job of `work_s` core seconds."""
        self._advance()
        job = Job(work_s, self._env.event(), self._virtual, self._virtual + work_s)
        heapq.heappush(self._heap, (job.end, next(self._order), job))
        self._running += 1
        self._set_alarm()
        return job

    def stop(self, job: Job) -> float:
        """End a job early; returns the core seconds that it received."""
        self._advance()
        if job.active:
            job.active = False
            self._running -= 1
            self._set_alarm()
        return min(self._virtual - job.begin, job.work_s)

    def set_speed(self, speed: float) -> None:
        """From now on everything runs at `speed` times what it would."""
        if speed != self._speed:
            self._advance()
            self._speed = speed
            self._set_alarm()

    def _rate(self) -> float:
        if self._running <= self._capacity:
            return self._speed
        return self._speed * (self._capacity / self._running)

    def _advance(self) -> None:
        now = self._env.now
        if now != self._since:
            self._virtual += (now - self._since) * self._rate()
            self._since = now

    def _set_alarm(self) -> None:
        """One timer at a time; a stale one finds a newer number and does nothing."""
        self._alarm += 1
        while self._heap and not self._heap[0][2].active:
            heapq.heappop(self._heap)
        if self._heap:
            delay = max(self._heap[0][0] - self._virtual, 0.0) / self._rate()
            timer = self._env.timeout(delay, self._alarm)
            timer.callbacks.append(self._on_alarm)

    def _on_alarm(self, timer: simpy.Event) -> None:
        if timer.value != self._alarm:
            return
        end = self._heap[0][0]
        self._virtual, self._since = end, self._env.now
        while self._heap and (self._heap[0][0] <= end or not self._heap[0][2].active):
            job = heapq.heappop(self._heap)[2]
            if job.active:
                job.active = False
                self._running -= 1
                job.done.succeed()
        self._set_alarm()
