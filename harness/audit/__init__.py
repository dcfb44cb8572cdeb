"""Audits: what an attacker who sees every release can tell of one example, measured on the loop that `dpft run` uses."""
