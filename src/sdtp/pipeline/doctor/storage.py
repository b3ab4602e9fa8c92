"""Room on disks."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from sdtp.disk import sync, temporary_sibling
from sdtp.pipeline.doctor.finding import Finding, one_line
from sdtp.pipeline.formats import memory

# The default run's folder holds about half of it, the model included.
RUN_BYTES = 2**30


def disk(results: Path) -> list[Finding]:
    """Room, and whether files can be written: results, temporary files, the hub's cache."""
    found = [_folder("results", results)]
    try:
        found.append(_folder("temporary files", Path(tempfile.gettempdir())))
    except FileNotFoundError as error:
        found.append(
            Finding("temporary files", "failure", one_line(error), "set TMPDIR to a folder that can be written")
        )
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants

        found.append(_folder("hub cache", Path(constants.HF_HUB_CACHE)))
    return found


def _folder(name: str, folder: Path) -> Finding:
    """Free bytes at a folder, and a file written there and removed again; at the nearest parent of one yet to be."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    probe = temporary_sibling(there / "doctor")
    try:
        probe.write_bytes(b"written to see whether it can be\n")
        sync(probe)
        free = shutil.disk_usage(there).free
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "make it a folder that you can write, with room on its disk"
        return Finding(name, "failure", f"{there} cannot be written: {reason}", advice)
    finally:
        if probe.exists():
            probe.unlink()
    found = f"{memory(free)} free at {folder}"
    if free < RUN_BYTES:
        return Finding(name, "warning", found, f"make room: the default run takes about half of {memory(RUN_BYTES)}")
    return Finding(name, "ok", found)
