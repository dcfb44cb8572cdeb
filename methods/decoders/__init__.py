"""Decoders: post-processing that turns the released noisy sum into an update; any method can be run with any of them."""
