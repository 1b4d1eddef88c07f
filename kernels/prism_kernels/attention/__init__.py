"""Causal attention within documents, and its decode step over a paged cache."""
