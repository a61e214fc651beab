"""Commands that follow a command, complete enough to paste. Source: this project."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import typer

from rayfed_lora.errors import RayfedError
from rayfed_lora.locations import child, is_uri, parent, without_secrets
from rayfed_lora.plugins.modules import flags
from rayfed_lora.printable import echo

_NAME = "rayfed-lora"


def command(*words: str, **options: str | None) -> str:
    """Return a command line, quoted for a shell; options without a value are left out.

    >>> command("run", "my runs/a", "--resume", address="10.0.0.1:6379").partition(" ")[2]
    "run 'my runs/a' --resume --address 10.0.0.1:6379"
    """
    # Not on the PATH: as this command was called.
    program = _NAME if shutil.which(_NAME) or not sys.argv[0].endswith(_NAME) else sys.argv[0]
    given = [text for name, value in options.items() if value for text in (f"--{name}", value)]
    return without_secrets(shlex.join([program, *words, *given]))


def same_command(*flags: str, **options: str | None) -> str:
    """Return the command line of this process, with flags and options that it does not have."""
    words = sys.argv[1:]
    new = {n: v for n, v in options.items() if not any(w.startswith(f"--{n}") for w in words)}
    return command(*words, *(flag for flag in flags if flag not in words), **new)


def resume_command(location: str, address: str | None, plugins: Sequence[str] = ()) -> str:
    """Return the command that continues a run; where it had not begun, the same one again."""
    from rayfed_lora.storage import RunFolder

    with suppress(RayfedError):
        if not RunFolder(location).exists("recipe.yaml"):
            return same_command()
    return command("run", location, "--resume", *flags(plugins), address=address)


@contextmanager
def resumable(how: Callable[[], str]) -> Iterator[None]:
    """Print a failure or an interrupt of the block, and the command that goes on; exit.

    Input that was rejected (exit status 2) is raised: nothing has started.
    """
    try:
        yield
    except KeyboardInterrupt:
        echo("rayfed-lora: ended at once", file=sys.stderr)
        status = 130
    except RayfedError as error:
        if error.exit_status == 2:
            raise
        echo(f"rayfed-lora: {error}", file=sys.stderr)
        status = error.exit_status
    else:
        return
    echo(f"to resume: {how()}", file=sys.stderr)
    raise typer.Exit(status)


def after_run(location: str) -> Mapping[str, str]:
    """Return what a finished run leaves behind, and the command that exports its model."""
    from rayfed_lora.runs.checksums import REPORT_FILE
    from rayfed_lora.storage import RunFolder

    folder = RunFolder(location)
    facts = {"run folder": location}
    for name, file in (("report", REPORT_FILE), ("adapter", "adapter")):
        if folder.exists(file):
            facts[name] = child(location, file)
    merge = () if "adapter" in facts else ("--merge",)
    facts["export"] = command("export", location, "--to", _beside(location), *merge)
    return facts


def _beside(location: str) -> str:
    """Return a local folder for the exported model of a run: beside the run, or in this folder."""
    folder, name = parent(location.rstrip("/"))
    name = f"{name or 'run'}-model"
    return name if is_uri(location) or folder == "." else child(folder, name)
