"""Which kernels NumPy's matrix products run on."""

import os
import sys

_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


def choose_kernels(cpuinfo: str = "/proc/cpuinfo") -> None:
    """Has OpenBLAS, when NumPy loads it, use its AVX-512 kernels on processors that have what they need.

    OpenBLAS knows processors by their numbers, and runs kernels of 2004 (SSE3) on those that are newer than itself: entropy
    parameters in integers then take 2.6 times as long. All its later AVX-512 processors multiply float64 with the kernels named here.
    Nothing is changed where NumPy is loaded already, or $OPENBLAS_CORETYPE is set.
    """
    if "numpy" in sys.modules or "OPENBLAS_CORETYPE" in os.environ:
        return
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as f:
            flags = next((line for line in f if line.startswith("flags")), "")
    except OSError:
        return
    if set(flags.split()) >= _AVX512:
        os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"
