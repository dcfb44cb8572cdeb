"""Clipping rules: by which function of its norm a gradient is clipped, and what becomes of the bound."""
