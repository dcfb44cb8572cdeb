"""Who makes the runs: this process, several, or a Ray cluster."""
