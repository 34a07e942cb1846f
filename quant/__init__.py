"""Weights and the layers that hold them. Knows torch, imports nothing else of this package."""
