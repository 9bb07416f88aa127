"""Work of one kernel shared among threads of one rank, of which only the rank's own may drive transfers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np

Poll = Callable[[], None]
Scratch = TypeVar("Scratch")
Item = TypeVar("Item")
Run = Callable[[Scratch, Poll, Item], None]

POLL_S: Final = 5e-4
"""How often a rank that waits for its own kernel threads drives transfers."""


def share(items: Iterator[Item], scratch: Sequence[Scratch], run: Run[Scratch, Item], poll: Poll) -> None:
    """Call ``run(scratch, poll, item)`` for each item, on a thread for each scratch: this one, which polls, and more.

    The first error in any thread ends them all and is raised here.
    """
    if len(scratch) == 1:
        for item in items:
            run(scratch[0], poll, item)
        return
    shared = _Shared(items, threading.Lock(), [])
    workers = [threading.Thread(target=_work, args=(shared, run, one, no_poll)) for one in scratch[1:]]
    for worker in workers:
        worker.start()
    _work(shared, run, scratch[0], poll)
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


def _work(shared: _Shared[Item], run: Run[Scratch, Item], scratch: Scratch, poll: Poll) -> None:
    """One thread's loop: take the next item until there is none or a thread has failed."""
    try:
        with np.errstate(all="ignore"):
            while not shared.failures and (item := shared.next()) is not None:
                run(scratch, poll, item)
    except BaseException as error:  # noqa: BLE001 - raised again in the rank's own thread
        shared.failures.append(error)


def no_poll() -> None:
    """Only one thread of a rank calls MPI."""
