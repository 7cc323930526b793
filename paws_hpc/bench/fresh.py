"""Work that a process can do only once: its start, and an epoch whose memory is watched. Prints one line of JSON.

python -m paws_hpc.bench.fresh first-batch STORE
python -m paws_hpc.bench.fresh epochs STORE THREADS
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()  # before torch is imported

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from paws_hpc.bench.own import paws_stream  # noqa: E402
from paws_hpc.store import ImageStore  # noqa: E402

_EPOCHS = 4  # the first one warms up, with what comes before it
_SLOW_STEP_S = 2.0  # in which everything that may be made ahead is made


def first_batch(path: Path) -> dict[str, float]:
    """Seconds from the first line of the program to its first batch, with and without the import of torch."""
    torch.set_num_threads(1)
    imported = time.perf_counter()
    store = ImageStore.open(path)
    opened = time.perf_counter()
    stream = paws_stream(store, threads=2)
    with stream.prefetch(0, 1) as batches:
        next(iter(batches))
    ready = time.perf_counter()
    return {
        "records": len(store),
        "imports_s": imported - _STARTED,
        "open_s": opened - imported,
        "first_batch_s": ready - imported,
    }


def epochs(path: Path, threads: int) -> dict[str, float | list[float]]:
    """Resident memory of this process, MB, at the end of each of a few epochs; files' pages are not counted.

    The warm-up has as many batches in use at once as there can ever be: those made ahead, one taken, and one still held
    by who takes the next. No later timing of threads can ask for more.
    """
    torch.set_num_threads(1)
    stream = paws_stream(ImageStore.open(path), threads=threads)
    with stream.prefetch(0, stream.steps_per_epoch) as batches:
        held = []
        for _ in range(2):
            held.append(next(batches))
            time.sleep(_SLOW_STEP_S)
        del held
    resident = []
    for epoch in range(_EPOCHS):
        first = epoch * stream.steps_per_epoch
        with stream.prefetch(first, first + stream.steps_per_epoch) as batches:
            for batch in batches:
                del batch
        resident.append(_resident_mb())
    return {"steps_per_epoch": stream.steps_per_epoch, "resident_mb": resident, "growth_mb": resident[-1] - resident[0]}


def _resident_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1000


if __name__ == "__main__":
    what, store = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(first_batch(store) if what == "first-batch" else epochs(store, int(sys.argv[3]))))
