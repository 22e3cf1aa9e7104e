"""Sparse training inside other tools, through the interfaces that they offer."""
