"""Work of one kernel shared among threads of one rank, of which only the rank's own may drive transfers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np

Poll = Callable[[], None]
Item = TypeVar("Item")
Run = Callable[[int, Poll, Item], None]

POLL_S: Final = 5e-4
"""How often a rank that waits for its own kernel threads drives transfers."""


def share(items: Iterator[Item], threads: int, run: Run[Item], poll: Poll) -> None:
    """Call ``run(thread, poll, item)`` for each item: here, or on all threads with this one polling between its own.

    The first error in any thread ends them all and is raised here.
    """
    if threads == 1:
        for item in items:
            run(0, poll, item)
        return
    shared = _Shared(items, threading.Lock(), [])
    workers = [threading.Thread(target=_work, args=(shared, run, index, no_poll)) for index in range(1, threads)]
    for worker in workers:
        worker.start()
    _work(shared, run, 0, poll)
    for worker in workers:
        while worker.is_alive():
            worker.join(POLL_S)
            poll()
    if shared.failures:
        raise shared.failures[0]


class _Shared(NamedTuple, Generic[Item]):
    """Work items that several threads take from, and what went wrong."""

    items: Iterator[Item]
    lock: threading.Lock
    failures: list[BaseException]

    def next(self) -> Item | None:
        """The next item, for one thread."""
        with self.lock:
            return next(self.items, None)


def _work(shared: _Shared[Item], run: Run[Item], index: int, poll: Poll) -> None:
    """One thread's loop: take the next item until there is none or a thread has failed."""
    try:
        with np.errstate(all="ignore"):
            while not shared.failures and (item := shared.next()) is not None:
                run(index, poll, item)
    except BaseException as error:  # noqa: BLE001 - raised again in the rank's own thread
        shared.failures.append(error)


def no_poll() -> None:
    """Only one thread of a rank calls MPI."""
