"""PyTorch implementations: any device, any dtype, chunked over the length where the op runs along it."""


def why_not() -> None:
    """Always here."""
