"""The strategies: every module in this folder that registers one is found by itself. See docs/adding-a-strategy.md."""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

for _module in sorted(iter_modules(__path__), key=lambda found: found.name):
    import_module(f"{__name__}.{_module.name}")
for _entry in entry_points(group="ringsim.strategies"):
    _entry.load()
