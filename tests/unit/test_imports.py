"""Modules that two threads of one process import at once."""

from __future__ import annotations

import subprocess
import sys

# What an actor does: one thread prepares the data, another one loads code.
PROGRAM = """
import threading
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.engines.factory import TorchFactory
recipe, go, failed = load_recipe("digits-vit"), threading.Barrier(2), []
def call(method):
    go.wait()
    try:
        method(recipe)
    except BaseException as error:
        failed.append(repr(error))
factory = TorchFactory()
threads = [threading.Thread(target=call, args=(m,)) for m in (factory.load, factory.workload)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
from rayfed_lora.models import base_models
print(failed, hasattr(base_models.transformers, "AutoModelForCausalLM"))
"""


def test_a_thread_that_prepares_data_and_one_that_loads_code_import_transformers_whole():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] True\n"
