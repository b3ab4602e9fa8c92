"""Which file system a path is on, and so whether other machines mean the same files by the same path."""

import os
import socket
from pathlib import Path
from typing import NamedTuple

NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p")
# The kernel's table of what is mounted.
MOUNTS = Path("/proc/self/mounts")


class Filesystem(NamedTuple):
    """What is mounted, a device or an address, and its kind, as the kernel calls them; empty where it does not say."""

    source: str
    kind: str


def filesystem(path: Path, mounts: Path = MOUNTS) -> Filesystem:
    """The file system that `path` is on, whether or not there is anything yet."""
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return Filesystem("", "")
    place = Path(os.path.realpath(path))
    longest, found = "", Filesystem("", "")
    for source, point, kind, *_ in rows:
        point = point.replace("\\040", " ")
        # The longest is the one that is seen; of equal ones the last, mounted over the others.
        if (point == "/" or place.is_relative_to(point)) and len(point) >= len(longest):
            longest, found = point, Filesystem(source, kind)
    return found


def place(path: Path, mounts: Path = MOUNTS) -> str:
    """`WHOSE:PATH`, with links followed: equal ones are the same file, whichever machine says so.

    Whose: this machine's name; on a network file system what is mounted, which other machines see under the same name.
    """
    source, kind = filesystem(path, mounts)
    return f"{source if kind in NETWORK_FILESYSTEMS else socket.gethostname()}:{path.resolve()}"
