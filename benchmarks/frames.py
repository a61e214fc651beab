"""How many frames of the package lie between a user's call of `rayfed_lora.run` and a gradient.

`python frames.py [CHECKOUT] [--executor local|threads|ray]` runs a small recipe and prints the
deepest stack of the package's frames, over all threads and processes on the way: the stack of the
user's call down to where work is handed over (`ThreadPoolExecutor.submit`, a call of a Ray actor or
task), then the stack of the thread or process that takes it, down to `Tensor.backward` or an
optimiser's step. Frames of other packages, such as contextlib's, do not count; those of the
package's generators do. The script knows no module of the package. A thread's work is followed to
the call of `submit` that woke the thread, which need not be the one that brought the work.

A copy of the script is the `sitecustomize` of all processes of the run, and writes what they do.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

PACKAGE = "rayfed_lora"
FOLDER = "RAYFED_LORA_FRAMES"  # environment variable: where the processes write what they have seen
EXECUTORS = {
    "local": {"executor": "local", "client_actors": 1},
    "threads": {"executor": "local", "client_actors": 2},
    "ray": {"executor": "ray", "client_actors": 2},
}
RUN = """
import json, sys, tempfile, rayfed_lora
with tempfile.TemporaryDirectory() as folder:
    rayfed_lora.run(json.loads(sys.argv[1]), folder + "/run")
"""
# A generator's frame counts as any other; it is named so that it can be seen.
GENERATOR = 0x20
_here = threading.local()


# In each process of the run.


def install() -> None:
    """Patch what hands work over, and what a gradient step calls, once their modules are there."""
    sys.meta_path.insert(0, _Patching())


class _Patching(importlib.abc.MetaPathFinder):
    """Finds the modules to be patched as Python does, and patches them when they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module that is to be patched; None for all others."""
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            PATCHES[name](module)

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


def _patch_threads(module: Any) -> None:
    submit = module.ThreadPoolExecutor.submit

    def followed(self: Any, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        above = _stacks()

        def taken() -> Any:
            before, _here.above = getattr(_here, "above", []), above
            try:
                return work(*args, **kwargs)
            finally:
                _here.above = before

        return submit(self, taken)

    module.ThreadPoolExecutor.submit = followed


def _patch_ray(kind: str) -> Callable[[Any], None]:
    def patch(module: Any) -> None:
        remote = getattr(module, kind)._remote

        def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = remote(self, *args, **kwargs)
            for first in (found if isinstance(found, list) else [found])[:1]:
                _write("handed", {"task": first.task_id().hex(), "stacks": _stacks()})
            return found

        getattr(module, kind)._remote = followed

    return patch


def _patch_backward(module: Any) -> None:
    backward = module.Tensor.backward

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        _write("step", {"stacks": _stacks()})
        return backward(self, *args, **kwargs)

    module.Tensor.backward = seen


def _patch_optimizer(module: Any) -> None:
    def seen(*_: Any) -> None:
        _write("step", {"stacks": _stacks()})

    module.register_optimizer_step_pre_hook(seen)


PATCHES: dict[str, Callable[[Any], None]] = {
    "concurrent.futures.thread": _patch_threads,
    "ray.actor": _patch_ray("ActorMethod"),
    "ray.remote_function": _patch_ray("RemoteFunction"),
    "torch._tensor": _patch_backward,
    "torch.optim.optimizer": _patch_optimizer,
}


def _stacks() -> list[dict[str, Any]]:
    """Return the stack of this thread, below those of the threads that have led here."""
    frames = [*_frames(sys._getframe(1))][::-1]
    thread = threading.current_thread().name
    own = {"pid": os.getpid(), "thread": thread, "task": _task(), "frames": frames}
    return [*getattr(_here, "above", []), own]


def _frames(frame: FrameType | None) -> Iterator[str]:
    package = sys.modules.get(PACKAGE)
    root = "" if package is None else str(package.__path__[0])
    while frame is not None:
        code = frame.f_code
        if root and code.co_filename.startswith(root + os.sep):
            name = getattr(code, "co_qualname", code.co_name)
            kind = " (generator)" if code.co_flags & GENERATOR else ""
            yield f"{os.path.relpath(code.co_filename, root)}:{name}{kind}"
        frame = frame.f_back


def _task() -> str | None:
    """Return the id of the Ray task that this thread runs, None where there is none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    found: str | None = context.get_task_id() if context.worker.mode == ray.WORKER_MODE else None
    return found


def _write(what: str, value: dict[str, Any]) -> None:
    line = json.dumps({"what": what, **value}) + "\n"
    with Path(os.environ[FOLDER], f"{os.getpid()}.jsonl").open("a") as file:
        file.write(line)


# In the process of the script.


def recipe(executor: str) -> dict[str, Any]:
    """Return a run of one round: no test can wait beside the training of another round."""
    net = {"architecture": "vit", "hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
    none = {"rounds": 0}
    return {
        "name": "frames",
        "data": {"source": "digits", "max_examples": 200, "partition": {"clients": 8}},
        "model": {"config": {**net, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "annealing": {
            "initiating": none,
            "heating": {"rounds": 1, "rank": 2},
            "cooling": none,
            "holding": none,
        },
        "clients": {"per_round": 8, "local_steps": 2},
        "runtime": {"device": "cpu", "cohort_size": 2, **EXECUTORS[executor]},
    }


def observed(checkout: Path, executor: str) -> list[dict[str, Any]]:
    """Run the recipe with the code of a checkout; return what its processes have written."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(__file__, Path(scratch, "sitecustomize.py"))
        path = os.pathsep.join([scratch, str(checkout)])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", FOLDER: scratch}
        command = [sys.executable, "-c", RUN, json.dumps(recipe(executor))]
        subprocess.run(command, env=environment, check=True, cwd=checkout)
        files = sorted(Path(scratch).glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def ways(seen: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the stacks from the user's call to each gradient step; those with most frames last."""
    handed = {each["task"]: each["stacks"] for each in seen if each["what"] == "handed"}

    def whole(stacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        task = stacks[0]["task"]
        return stacks if task is None else [*whole(handed[task]), *stacks]

    found = [whole(each["stacks"]) for each in seen if each["what"] == "step"]
    ours = [way for way in found if way[0]["frames"] and way[0]["thread"] == "MainThread"]
    if not ours or len(ours) < len(found):
        raise SystemExit("not each gradient step could be followed back to the user's call")
    return sorted(ours, key=depth)


def depth(way: Sequence[dict[str, Any]]) -> int:
    """Return the number of frames in some stacks."""
    return sum(len(stack["frames"]) for stack in way)


def main() -> None:
    """Print the deepest stack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parents[1]
    parser.add_argument("checkout", nargs="?", type=lambda path: Path(path).resolve(), default=here)
    parser.add_argument("--executor", choices=EXECUTORS, default="local")
    args = parser.parse_args()
    found = ways(observed(args.checkout, args.executor))
    least, way = found[0], found[-1]
    for stack in way:
        print(f"process {stack['pid']}, thread {stack['thread']}: {len(stack['frames'])} frames")
        for frame in stack["frames"]:
            print(f"    {frame}")
    generators = sum(frame.endswith("(generator)") for stack in way for frame in stack["frames"])
    print(f"{args.executor}: {depth(way)} frames of {PACKAGE}, {generators} of them of generators")
    print(f"the shortest way to a gradient step: {depth(least)} frames")


if __name__ == "sitecustomize":
    install()
if __name__ == "__main__":
    main()
