"""Benchmarks: what users measure on their machine; :mod:`paws_hpc.bench.peers` holds other libraries' side."""
