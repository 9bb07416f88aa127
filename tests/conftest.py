"""Hypothesis draws anew on a developer's machine and repeats itself in CI, where a busy host is no fault."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("ci", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
if os.environ.get("CI"):
    settings.load_profile("ci")
