"""``deterministic=true``: the same bits from two runs on devices of one kind."""

from __future__ import annotations

import os

import torch


def set_determinism(wanted: bool) -> None:
    """Have torch take kernels with one order of sums, or not; to be called before anything runs on a GPU.

    An operation that has no such kernel is then a RuntimeError that names it. CPUs give equal bits in either case, for
    the same number of threads.
    """
    if wanted:  # read when cuBLAS starts; without it, its products on several streams share memory and may differ
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    # Nothing here reads memory that it did not write, as tests/unit/test_determinism.py shows with this turned on.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
