"""Benchmarks of fastres on the machine at hand; `python -m bench` runs them."""
