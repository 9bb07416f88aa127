"""Hypothesis draws anew on a developer's machine and repeats itself in CI, where a busy host is no fault."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# helpers of the tests import one another by plain name, as programs/ do
sys.path.insert(0, str(Path(__file__).parent))
# and benchmarks/gpu.py its sections
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "here")
