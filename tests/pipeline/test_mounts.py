"""Which file system a path is on, and which paths of which machines are the same file."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sdtp.pipeline.mounts import Filesystem, filesystem, place

TABLE = (
    "/dev/vda / ext4 rw 0 0\nhost:/a /mnt/shared nfs4 rw 0 0\n/dev/vdb /mnt/shared/local xfs rw 0 0\n"
    "host:/b /mnt/two\\040words cifs rw 0 0\ntmpfs /mnt/over tmpfs rw 0 0\n/dev/vdc /mnt/over ext4 rw 0 0\n"
)


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    (tmp_path / "mounts").write_text(TABLE, encoding="utf-8")
    return tmp_path / "mounts"


def test_the_file_system_of_the_longest_mount(mounts: Path) -> None:
    for path, found in (
        ("/home/x", ("/dev/vda", "ext4")),
        ("/mnt/shared", ("host:/a", "nfs4")),
        ("/mnt/shared/a/b", ("host:/a", "nfs4")),
        ("/mnt/sharedness", ("/dev/vda", "ext4")),
        ("/mnt/shared/local/x", ("/dev/vdb", "xfs")),
        ("/mnt/two words/x", ("host:/b", "cifs")),
        ("/mnt/over/x", ("/dev/vdc", "ext4")),
    ):
        assert filesystem(Path(path), mounts) == found
    assert filesystem(Path("/"), mounts.with_name("none")) == Filesystem("", "")


def test_a_place_is_a_machines_unless_it_is_on_the_network(
    mounts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = socket.gethostname()
    assert place(Path("/mnt/shared/local/x"), mounts) == f"{host}:/mnt/shared/local/x"
    assert place(Path("/mnt/shared/x"), mounts) == "host:/a:/mnt/shared/x"
    (tmp_path / "link").symlink_to("/mnt/shared")
    assert place(tmp_path / "link" / "x", mounts) == "host:/a:/mnt/shared/x"
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert place(Path("/mnt/shared/local/x"), mounts) == "another:/mnt/shared/local/x"
    assert place(Path("/mnt/shared/x"), mounts) == "host:/a:/mnt/shared/x"
