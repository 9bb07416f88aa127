"""The GPU backend made on every rank, as `--backend cupy --transport auto` makes it: device, kernels, transport and its proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..errors import RingsimError
from ..transport import Transport
from .finding import Finding

REMEDY = "docs/clusters.md says what to do where a proof fails; until then: --transport mpi-staged, or ipc within one host"


class Trial(NamedTuple):
    """What came of it: findings, and the sentence that names the transport and why it was chosen (empty if none was)."""

    findings: tuple[Finding, ...] = ()
    said: str = ""


def make(transport: Transport) -> Trial:
    """Make the backend, move a pattern through the transport, and free both; collective."""
    from ..engine import engine_of

    made = engine_of(transport, backend="cupy", transport="auto")
    if made.transport is not transport:
        made.transport.close()
    fused = ", then ".join(str(name) for name in made.facts.get("fused", ()))
    findings = [Finding(subject="trial", name="transport", fact=made.said)]
    if fused:
        findings.append(Finding(subject="trial", name="fused kernels", fact=f"{fused}"))
    return Trial(tuple(findings), made.said)


def attempt(transport: Transport, how: Callable[[Transport], Trial] = make) -> Trial:
    """The trial; where it fails, that. An error that only some ranks meet reaches the others as a timeout."""
    try:
        return how(transport)
    except RingsimError as error:
        text = str(error)
    except Exception as error:  # noqa: BLE001 - whatever stands between ringsim and the GPUs is the finding
        text = f"{type(error).__name__}: {error}"
    return Trial((Finding(subject="trial", name="--backend cupy", fact=text, status="wrong", remedy=REMEDY),))
