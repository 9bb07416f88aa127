"""Machines in YAML; read with importlib.resources."""
