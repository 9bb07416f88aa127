"""``python -m ringsim``."""

from .cli.main import main

main()
