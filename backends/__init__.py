"""Backends compute, transports move; both are picked by name and imported only then."""
