"""A trained pruner as an MLflow model, in a folder: what `mlflow.pyfunc.load_model` takes."""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sdtp.pipeline import served

# What a version needs beside the code that is copied with it.
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "jinja2")
EXAMPLE = "Which tokens of a long prompt does an answer need?"


def save_model(folder: Path, pruner: Path, model_config: Mapping[str, Any]) -> None:
    """Writes the model to `folder`, which must not exist: pruner, code, signature, input example and requirements.

    pruner: folder of a trained pruner. model_config: which language model it prunes, see `served.ServedPruner`.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "text"), ColSpec("long", "prompt_tokens"), ColSpec("long", "kept_tokens")]),
        params=ParamSchema([ParamSpec("max_new_tokens", "long", served.NEW_TOKENS)]),
    )
    with TemporaryDirectory() as temporary:
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=served.__file__,
            artifacts={"pruner": str(pruner)},
            code_paths=[str(_library(Path(temporary)))],
            model_config=dict(model_config),
            signature=signature,
            input_example=(pd.DataFrame({"prompt": [EXAMPLE]}), {"max_new_tokens": 8}),
            # Named, not inferred: for that MLflow would load the language model and generate from the example.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )


def _library(folder: Path) -> Path:
    """A copy of the part of this package that a pruner needs, in `folder`."""
    spec = importlib.util.find_spec("sdtp")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package sdtp is not to be found on disk")
    source, copy = Path(spec.origin).parent, folder / "sdtp"
    copy.mkdir()
    for name in ("__init__.py", "disk.py", "errors.py"):
        shutil.copyfile(source / name, copy / name)
    shutil.copytree(source / "pruning", copy / "pruning", ignore=shutil.ignore_patterns("__pycache__"))
    return copy
