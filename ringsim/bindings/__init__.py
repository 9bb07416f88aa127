"""Ring attention inside other systems' automatic differentiation; each module needs its library, and imports no other."""
