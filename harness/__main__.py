"""`python -m dpft.harness`: the `dpft` command."""

from dpft.harness.cli import main

main()
