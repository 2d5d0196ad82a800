"""Threads for work that is nearly all in compiled code, and that Ctrl-C stops. Called by the native protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

Result = TypeVar("Result")


@contextmanager
def pool() -> Iterator[Executor]:
    """As many threads as this process has processors; on an error or Ctrl-C, what has not begun is dropped.

    Linear algebra takes one thread meanwhile: its threads and these would only wait for each other.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(1, "blas"):
        threads = ThreadPoolExecutor(processors)
        try:
            yield threads
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def result(future: Future[Result]) -> Result:
    """What a thread made. Waits a moment at a time: once illico is imported, an endless wait does not hear Ctrl-C."""
    while wait([future], timeout=0.1).not_done:
        pass
    return future.result()
