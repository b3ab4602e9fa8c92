"""Runs the saliency step in processes that kill themselves: `python -m tests.pipeline.killed_saliency PLAN`.

PLAN is a JSON file: a list of [phase, count, log, computed, arguments of `sdtp`]. Each entry runs in a process of its
own, one after the other, and kills itself with SIGKILL when it gets to the phase for the count-th time; "" lets it end:

    compute   a batch is about to run
    write     half of a chunk's bytes are in its temporary file
    rename    a chunk is whole under its temporary name
    assembly  the shard is whole under its temporary name
    finish    the shard and the metrics are in place, the chunks still there

`computed` gets the prompt tokens of every example that was computed, one a line. Prints each process's exit status.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from sdtp import cli
from sdtp.pipeline import shards
from sdtp.pipeline.steps import saliency
from tests.pipeline.killed import run_each


def run(phase: str, count: int, log: str, computed: str, arguments: list[str]) -> None:
    """What a process does."""
    left = count

    def reached(name: str) -> None:
        nonlocal left
        if name == phase:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    replace, save_file, batch_saliency, rmtree = os.replace, shards.save_file, saliency.batch_saliency, shutil.rmtree

    def killed_replace(source: Any, target: Any) -> None:
        if Path(target).name.startswith("chunk-"):
            reached("rename")
        if Path(target).name.startswith("shard-"):
            reached("assembly")
        replace(source, target)

    def killed_save(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        if "chunk-" in path.name and phase == "write" and left == 1:
            os.truncate(path, path.stat().st_size // 2)
        if "chunk-" in path.name:
            reached("write")

    def killed_saliency(model: Any, prompts: Any, *others: Any) -> Any:
        reached("compute")
        found = batch_saliency(model, prompts, *others)
        with open(computed, "a", encoding="utf-8") as file:
            file.writelines(f"{len(prompt)}\n" for prompt in prompts)
        return found

    def killed_rmtree(path: Any, **others: Any) -> None:
        reached("finish")
        rmtree(path, **others)

    os.replace, shards.save_file, saliency.batch_saliency = killed_replace, killed_save, killed_saliency
    shutil.rmtree = killed_rmtree
    sys.exit(cli.main(["--log", log, *arguments]))


if __name__ == "__main__":
    run_each(run, Path(sys.argv[1]))
