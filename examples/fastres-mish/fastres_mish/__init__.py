"""Mish for fastres: an activation from outside."""
