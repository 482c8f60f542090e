"""PyTorch implementations: any device, any dtype, chunked over the length where the op runs along it."""
