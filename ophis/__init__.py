"""Ophis: state-space sequence models on any machine, without a build step."""

__version__ = "0.1.0"
