"""After `keep_freed_memory` a buffer that was freed is there again without page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from research.core import mesh

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 20 * 2**20

def faults(rounds=10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        a, b = libc.malloc(size), libc.malloc(size)
        ctypes.memset(a, 1, size), ctypes.memset(b, 1, size)
        libc.free(b), libc.free(a)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds

libc.mallopt(-3, 2**17)  # glibc's own threshold, so that the first count does not depend on history
usual = faults()
assert mesh.keep_freed_memory()
faults(1)
print(int(usual), int(faults()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_reused_without_page_faults():
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    ).stdout
    usual, kept = map(int, out.split())
    pages = 2 * 20 * 2**20 // 4096
    assert kept <= usual / 10 and kept < pages / 100
