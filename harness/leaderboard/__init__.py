"""Leaderboards: settings chosen on one half of the validation data by equal trials, methods judged on the other half with fresh
seeds, and seeds added until the verdicts are in."""
