"""What the processes that fork `sdtp` share: everything imported once, and a child that runs one program and ends."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from typing import NoReturn


def load() -> None:
    """Imports what any step needs, so that a child has it."""
    import mlflow.tracking  # noqa: F401
    import snakemake.cli  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from sdtp import cli

    for path in cli.steps().values():
        importlib.import_module(f"sdtp.pipeline.steps.{path.stem}")
    gc.collect()
    gc.freeze()


def run(program: str, arguments: list[str]) -> NoReturn:
    """Runs `sdtp` or `snakemake` as this process, which ends.

    It ends with what the interpreter would do for what the user sees, and without the rest, which takes seconds here:
    freeing all that was imported copies every page of it.
    """
    import snakemake.cli

    import sdtp.cli

    sys.argv = [program, *arguments]
    main = {"sdtp": sdtp.cli.main, "snakemake": snakemake.cli.main}[program]
    status: object = 1
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
