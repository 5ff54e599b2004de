"""Adapters at a few bits: codebooks, packed files, and what makes and reads them."""
