"""Benchmarks: each prints its table and writes build/bench/<name>.json. Run by hand or by make, not by pytest."""
