"""Machines made on this one: each is a network, PID, mount and UTS namespace with sshd.

They are joined by a bridge that lies in a namespace too, so nothing that runs in them can reach,
or be reached from, anything outside. All that runs on a machine ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

NETWORK = "10.77.0"
CONTROL = f"{NETWORK}.2"
TOKEN = "0123456789abcdef" * 4
TOOLS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "curl": "curl",
}
START_S = 30.0

SSHD = """\
Port 22
HostKey {work}/hostkey
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile none
MaxSessions 50
MaxStartups 100
"""

# What a namespace sees: its own /tmp, /dev/shm, home and names; the test's folder, the virtual
# environment and its interpreter, wherever they lie, at the same places as outside.
INIT = """\
set -e
hostname {name}
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/keep
for folder in {kept}; do mkdir -p /run/keep$folder; mount --bind $folder /run/keep$folder; done
mount -t tmpfs -o size=2g,mode=1777 tmpfs /tmp
mount -t tmpfs -o size=8g,mode=1777 tmpfs /dev/shm
mount --bind /run/keep{home} /root
for folder in {kept}; do mkdir -p $folder; mount --bind /run/keep$folder $folder; done
mount --bind {work}/hosts /etc/hosts
exec $(command -v sshd) -D -e -f {work}/{name}/sshd_config
"""

# Stands for uv, which would fetch what the test's environment has: the project is found where the
# cluster file has put it.
UV = """\
#!/bin/sh
test "$1 $2" = "pip install" && test -f constraints.txt && test -f pyproject.toml \\
  && echo "export PYTHONPATH=$PWD" >> ~/.bashrc
"""


def require(*modules: str) -> None:
    """Skip the test where the machine lacks what it needs, saying what."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    for module in modules:
        pytest.importorskip(module)
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes network namespaces")
    if missing:
        pytest.skip(f"needs the packages {', '.join(missing)}")
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--fork", "true"], check=False, capture_output=True
    )
    if tried.returncode != 0:
        pytest.skip("needs namespaces, which this machine does not let be made")


class Hosts:
    """Some machines, and the place beside them (`control`) from which they are used."""

    def __init__(self, work: Path, names: Sequence[str], first: int = 10) -> None:
        """Make nothing yet.

        Args:
            work: a folder that all of them share, at this path.
            names: of the machines.
            first: last number of the first one's address; the others follow.
        """
        self.work = work
        self.addresses = {name: f"{NETWORK}.{first + i}" for i, name in enumerate(names)}
        self.key = work / "id_ed25519"
        self.home = work / "control"
        # Names of namespaces are the machine's: others' tests may be running.
        self._prefix = f"rf{os.getpid()}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def namespace(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def start(self, profile: Mapping[str, str]) -> None:
        """Make the machines, every shell on them with that environment; wait until they answer."""
        for key in (self.key, self.work / "hostkey"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        names = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        (self.work / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self._write_token(self.home)
        switch = self.namespace("sw")
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        self._join("ctl", CONTROL)
        for name, address in self.addresses.items():
            self._join(name, address)
            self._boot(name, profile)
        for address in self.addresses.values():
            self._wait_for(address)

    def _write_token(self, home: Path) -> None:
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text(TOKEN)
        (home / ".ray" / "auth_token").chmod(0o600)

    def _join(self, name: str, address: str) -> None:
        inside, switch = self.namespace(name), self.namespace("sw")
        run("ip", "netns", "add", inside)
        run("ip", "-n", inside, "link", "set", "lo", "up")
        wire = ["type", "veth", "peer", "name", "eth0", "netns", inside]
        run("ip", "-n", switch, "link", "add", f"v{name}", *wire)
        run("ip", "-n", switch, "link", "set", f"v{name}", "master", "br0", "up")
        run("ip", "-n", inside, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", inside, "link", "set", "eth0", "up")

    def _boot(self, name: str, profile: Mapping[str, str]) -> None:
        folder = self.work / name
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        shutil.copy(f"{self.key}.pub", home / ".ssh" / "authorized_keys")
        (home / ".local" / "bin").mkdir(parents=True)
        uv = home / ".local" / "bin" / "uv"
        uv.write_text(UV)
        uv.chmod(0o755)
        (home / "venv").symlink_to(sys.prefix)
        (home / ".bash_profile").touch()
        lines = [f"export {variable}='{value}'\n" for variable, value in profile.items()]
        (home / ".bashrc").write_text("".join(lines))
        (folder / "sshd_config").write_text(SSHD.format(work=self.work))
        kept = dict.fromkeys(map(str, (self.work, sys.prefix, sys.base_prefix)))
        init = INIT.format(name=name, kept=" ".join(kept), home=home, work=self.work)
        (folder / "init.sh").write_text(init)
        apart = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        with (folder / "sshd.log").open("wb") as log:
            process = subprocess.Popen(
                [*self._inside(name), *apart, "--mount-proc", "bash", str(folder / "init.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _inside(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(name)]

    def _wait_for(self, address: str) -> None:
        deadline = time.monotonic() + START_S
        while not self.reachable(address, 22):
            assert time.monotonic() < deadline, f"no sshd at {address}"
            time.sleep(0.1)

    def reachable(self, address: str, port: int) -> bool:
        """Return whether something listens there, as seen from `control`."""
        connect = f"exec 3<>/dev/tcp/{address}/{port}"
        tried = subprocess.run(
            [*self._inside("ctl"), "timeout", "3", "bash", "-c", connect],
            check=False,
            capture_output=True,
        )
        return tried.returncode == 0

    def routes(self) -> list[str]:
        """Return the networks that `control` has a way to."""
        shown = run(*self._inside("ctl"), "ip", "route")
        return [line.split()[0] for line in shown.splitlines()]

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return a command as `control` runs it: it sees no process but its own."""
        apart = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        return [*self._inside("ctl"), *apart, *arguments]

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LANG", "TERM") if name in os.environ}
        return kept | {
            "HOME": str(self.home),
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "TMPDIR": str(self.home),
            "RAY_TMPDIR": str(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            **more,
        }

    def processes(self, name: str) -> set[str]:
        """Return the names of what runs on a machine."""
        pids = run("ip", "netns", "pids", self.namespace(name)).split()
        found = set()
        for pid in pids:
            with contextlib.suppress(OSError):
                found.add(Path(f"/proc/{pid}/comm").read_text().strip())
        return found

    def stop(self) -> None:
        """End the machines and all that runs on them."""
        for process in self._processes:
            process.kill()
            process.wait()
        for line in run("ip", "netns", "list").splitlines():
            if line.split()[0].startswith(self._prefix):
                subprocess.run(["ip", "netns", "del", line.split()[0]], check=False)


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def hosts(work: Path, names: Sequence[str], first: int = 10, **profile: str) -> Iterator[Hosts]:
    """Make machines for the time of a test."""
    made = Hosts(work, names, first)
    try:
        made.start(profile)
        assert made.routes() == [f"{NETWORK}.0/24"], "only the machines may be reached"
        yield made
    finally:
        made.stop()
