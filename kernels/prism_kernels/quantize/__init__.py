"""Casting to FP8."""
