"""Arithmetic on the CPU that gives the same bits on every x86-64 CPU with AVX2.

A library takes the kernels that suit the CPU best and cuts its work by the number of threads, and
both decide how sums are rounded. Portable arithmetic names kernels that Intel's and AMD's CPUs
share, and two threads. PARITY.md shows on which CPUs it was tried, and what it costs.

The libraries read these variables when they are loaded or first used, so they are set before torch
is imported, or in the environment of a process that imports it.
"""

import os

THREADS = 2
KERNELS = {
    "MKL_CBWR": "COMPATIBLE",  # products of matrices; MKL has no other path that AMD's CPUs share
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "ATEN_CPU_CAPABILITY": "avx2",  # all else in torch
}
# A thread that waits for another sleeps. By default it spins for a millisecond, and on a machine
# that others use too it then takes the core that the other thread needs.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def prepare(device: str, *, portable: bool) -> None:
    """Let this process compute so, unless on ``cuda``; torch's threads are set once it is there."""
    if device != "cuda":
        os.environ |= WAITING | (KERNELS if portable else {})


def environment(*, portable: bool) -> dict[str, str]:
    """Variables for a process that computes on the CPU."""
    if not portable:
        return WAITING
    threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    return WAITING | KERNELS | threads | {"MKL_DYNAMIC": "FALSE"}
