"""The types that a method knows."""
