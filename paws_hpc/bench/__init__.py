"""Benchmarks: what users measure on their machine; in :mod:`paws_hpc.bench.peers` the same work in the paper's way."""
