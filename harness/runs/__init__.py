"""What a run is: spec, names, suites, what it will spend."""
