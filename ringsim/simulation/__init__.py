"""The simulator: predicts a schedule's timeline on a topology."""

from .simulator import exposed_communication_s, simulate

__all__ = ["exposed_communication_s", "simulate"]
