"""Records on disk, what ties their parts together, and their verification."""
