import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, sys
from vgen.io.allocator import bound_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def block(size):
    pointer = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(pointer, 1, size)
    return pointer

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

if sys.argv[1] == "bound":
    bound_memory()
libc.free(block(2**24))  # raises glibc's own threshold
before, blocks, kept = resident(), [], []
for _ in range(16):
    blocks.append(block(2**22))
    kept.append(block(2**16))  # the heap cannot shrink below it
for pointer in blocks:
    libc.free(pointer)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_blocks_are_returned_to_the_system():
    def growth(kind, **environment):
        command = [sys.executable, "-c", SCRIPT, kind]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert growth("glibc") > 30  # of 64 MiB
    assert growth("bound") < 4
    assert growth("bound", MALLOC_MMAP_THRESHOLD_=str(2**25)) > 30  # the user's setting takes precedence


def test_other_programs_can_allocate_as_usual():
    code = (
        "import os\nfrom vgen.io.allocator import bound_memory, usual_environment\nbefore = dict(os.environ)\n"
        "bound_memory()\nassert usual_environment() == before\nprint(len(os.environ) - len(before))"
    )

    def added(**environment):
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert added() == 2
    assert added(MALLOC_MMAP_THRESHOLD_="65536", THP_MEM_ALLOC_ENABLE="0") == 0  # those of the user stay
