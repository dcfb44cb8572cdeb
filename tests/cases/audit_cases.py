"""What the tests of audits share: a small setting."""

SMALL = dict(steps=24, canaries=32, sampling_rate=0.25, epsilon=4.0)
