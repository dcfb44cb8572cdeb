"""One training core, one accountant, one store: everything that is the same for all methods."""
