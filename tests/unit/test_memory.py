"""Memory that a training step frees and the next one takes again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# How many pages the system has to find for twenty steps; without `keep_freed_memory` 6,000 to
# 10,000 of them.
STEPS = """
import resource
import torch
from torch import nn
from rayfed_lora.training.device import keep_freed_memory

assert keep_freed_memory()
torch.set_num_threads(1)
part = lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
model = nn.Sequential(*[part() for _ in range(16)])

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        model(torch.ones(1400, 64)).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(5)
print(faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_gets_what_the_last_one_has_freed():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2_000


RETURNED = """
import torch
from rayfed_lora.training.device import keep_freed_memory, return_freed_memory

def resident_mb():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 1e6

assert keep_freed_memory()
# 200 MB in pieces that are small enough to be kept, with something behind them that stays.
pieces = [torch.ones(250_000) for _ in range(200)]
last = torch.ones(1000)
del pieces
before = resident_mb()
return_freed_memory()
print(before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_was_kept_can_be_returned():
    command = [sys.executable, "-c", RETURNED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150
