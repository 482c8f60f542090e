"""Layers and the block around them."""
