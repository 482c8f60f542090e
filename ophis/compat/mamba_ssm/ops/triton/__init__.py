"""What the original has in Triton; here whatever backend is fastest."""
