"""Benchmarks: what this program does beside what people use instead, on the same images, in one run."""
