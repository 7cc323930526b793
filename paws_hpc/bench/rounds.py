"""Candidates measured in rounds: each in a process of its own, all in turns, so that all meet the same slow moments.

This module imports nothing that starts threads: a candidate's process loads it before it is bound to its cores.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from threading import Thread
from time import monotonic, perf_counter
from typing import Any

_LIMIT_S = 1200.0  # for one answer of a candidate


class CandidateError(RuntimeError):
    """A candidate cannot be prepared or failed."""


@dataclass(frozen=True)
class Round:
    """``done`` units of work in ``seconds``, and what else was measured meanwhile."""

    done: float
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


Work = Callable[[], float | Round]
"""Works for one round. Returns how much it did, or a Round where it takes the time itself."""

Candidate = Callable[[], Work]
"""One of the programs that a measurement compares: a partial call of a module's function, which prepares the work."""


@dataclass
class Rates:
    """What one candidate did in each round, or why it failed."""

    rounds: list[Round] = field(default_factory=list)
    failure: str | None = None

    @property
    def per_s(self) -> list[float]:
        """Units per second of each round."""
        return [each.done / each.seconds for each in self.rounds]


def median(values: Iterable[float]) -> float | None:
    """None without values, as where a candidate failed."""
    values = list(values)
    return statistics.median(values) if values else None


def ratio(candidate: Rates, baseline: Rates) -> float | None:
    """How many times as fast: the median over rounds of the ratio within a round; None where one of them failed."""
    if candidate.failure is not None or baseline.failure is not None:
        return None
    return median(a / b for a, b in zip(candidate.per_s, baseline.per_s, strict=True))


@contextmanager
def started(candidate: Candidate, *, cores: Sequence[int], limit_s: float = _LIMIT_S) -> Iterator[Callable[..., Round]]:
    """A prepared candidate in a process of its own, bound to ``cores`` with all that it starts.

    A call is one round; ``limit_s`` holds for it too, unless it is given another.

    Raises:
        CandidateError: it fails, or gives no answer within ``limit_s``; then it is killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_bind, initargs=(cores,)) as pool:

        def call(limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
            answer = pool.submit(function, *arguments)
            try:
                error = answer.exception(limit_s)
            except TimeoutError:
                os.killpg(process, signal.SIGKILL)
                raise CandidateError(f"no answer within {limit_s:.3g} s") from None
            if error is not None:
                raise CandidateError(f"{type(error).__name__}: {error}") from error
            return answer.result()

        process: int = call(_LIMIT_S, os.getpid)
        try:
            call(limit_s, _prepare, candidate)
            yield lambda limit_s=limit_s: call(limit_s, _work_once)
        finally:  # processes that the candidate started would keep its own from ending
            with suppress(CandidateError, BrokenExecutor):
                call(_LIMIT_S, _close)


until_exit = ExitStack()
"""In a candidate's process: what is closed when its work is over."""
_prepared: list[Work] = []  # in a candidate's process: its work


def _bind(cores: Sequence[int]) -> None:
    os.setsid()  # so that the process can be ended together with those that it starts
    os.sched_setaffinity(0, cores)  # before threads exist: they inherit it
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its candidates."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _close() -> None:
    until_exit.close()


def _prepare(candidate: Candidate) -> None:
    _prepared.append(candidate())


def _work_once() -> Round:
    began = perf_counter()
    done = _prepared[0]()
    seconds = perf_counter() - began
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the next candidate may need the memory
    return done if isinstance(done, Round) else Round(done, seconds)


def race(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int,
    cores: int | None = None,
    limit_s: float = math.inf,
    progress: Callable[[str], object],
) -> dict[str, Rates]:
    """Let every candidate work once per round, in turns, after a round that warms it up and does not count.

    Each is bound to ``cores`` cores while the others wait; None binds to all that this process may use. A candidate
    that failed says why and takes no further turn. So does one that is not warm when ``limit_s`` is over: compilers
    take minutes, and those that are ready are measured all the same.
    """
    ready = monotonic() + limit_s

    def left() -> float:
        return min(_LIMIT_S, max(0.0, ready - monotonic()))

    bound = sorted(os.sched_getaffinity(0))[:cores]
    rates = {name: Rates() for name in candidates}
    with ExitStack() as running:
        workers = {}
        for name, candidate in candidates.items():
            progress(f"{name}: preparing")
            try:
                work = running.enter_context(started(candidate, cores=bound, limit_s=left()))
                work(left())
                workers[name] = work
            except CandidateError as error:
                rates[name] = Rates(failure=str(error))
        for number in range(1, rounds + 1):
            first = number % len(candidates)  # nobody always follows the same one
            for name in list(rates)[first:] + list(rates)[:first]:
                if name not in workers:
                    continue
                progress(f"{name}: round {number} of {rounds}")
                try:
                    rates[name].rounds.append(workers[name](_LIMIT_S))
                except CandidateError as error:
                    del workers[name]
                    rates[name] = Rates(failure=str(error))
    return rates


def run_once(candidate: Candidate) -> Round:
    """One round in a fresh process on all cores, without a warm-up; raises CandidateError."""
    with started(candidate, cores=sorted(os.sched_getaffinity(0))) as work:
        return work()
