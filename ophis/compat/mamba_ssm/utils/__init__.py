"""Decoding, and the reading of checkpoints."""
