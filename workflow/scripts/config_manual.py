"""Prints config/README.md, made from the config schema."""

from pathlib import Path

from sdtp.pipeline.schema import load_schema
from sdtp.pipeline.schema_manual import manual

print(manual(load_schema(Path(__file__).parents[1] / "schemas" / "config.schema.yaml")), end="")
