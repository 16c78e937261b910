"""Constrained decoding: which tokens may come next in an output."""
