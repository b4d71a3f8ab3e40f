"""Conversion between public weights and ours."""
