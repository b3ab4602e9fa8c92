"""The configuration of each shipped file, resolved: what a run with it would use. `python -m tests.workflow.golden`
writes the golden files anew; read the difference before committing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from snakemake.utils import update_config

from sdtp.pipeline.schema import load_schema, resolve
from tests.workflow.project import ROOT

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = load_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")
FILES = sorted(str(path.relative_to(ROOT / "config")) for path in (ROOT / "config").rglob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """A config file as it stands."""
    content = yaml.safe_load((ROOT / "config" / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def resolved(name: str) -> dict[str, Any]:
    """A config file laid over the default one as Snakemake does it, with defaults filled."""
    config = read("config.yaml")
    update_config(config, read(name))
    return resolve(config, SCHEMA)


def golden_file(name: str) -> Path:
    """Where the resolved configuration of config file `name` is kept."""
    return GOLDEN / name.replace("/", "-")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file in FILES:
        golden_file(file).write_text(yaml.safe_dump(resolved(file), sort_keys=False), encoding="utf-8")
