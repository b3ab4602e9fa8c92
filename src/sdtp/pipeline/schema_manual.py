"""The config's manual, made from its schema."""

from collections.abc import Iterator
from typing import Any

from sdtp.pipeline.schema_words import Schema, accepted, shown


def manual(schema: Schema) -> str:
    """The config's manual in Markdown: every key, what is accepted, its default and its meaning."""
    lines = [
        "# Configuration",
        "",
        "`config.yaml` is the default run. Another file is laid over it with `snakemake --configfile FILE`: blocks are",
        "merged key by key, lists are replaced, and a `source` has to be stated whole. A wrong key, type or range is",
        "refused before anything runs.",
        "",
        "| file | what it is |",
        "|---|---|",
        "| `config.yaml` | the default run: small, real, offline; a quarter of an hour on two CPU cores |",
        "| `study.yaml` | quality with enough examples to tell methods apart (`make study`) |",
        "| `bench.yaml` | latency and memory up to 4096 tokens (`make bench`) |",
        "| `ablations/*.yaml` | variants of one configuration, compared by `snakemake ablation` |",
        "| `paper/*-7b.yaml` | the paper's scale, for 8 GPUs; every key stated |",
        "| `paper/smollm2-135m.yaml` | the paper on the default model, offline (`snakemake paper`) |",
        "",
        "<!-- The rest is generated from workflow/schemas/config.schema.yaml by `make config/README.md`. -->",
    ]
    blocks = {name: node for name, node in schema["properties"].items() if node.get("properties")}
    top = [(name, node) for name, node in schema["properties"].items() if name not in blocks]
    lines += ["", *_table(top)]
    for name, node in schema["properties"].items():
        if name in blocks:
            lines += ["", f"## `{name}`", "", node["description"], "", *_table(_flat(node, f"{name}."))]
    return "\n".join(lines) + "\n"


def _flat(node: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
    for key, child in node["properties"].items():
        if child["type"] == "object":
            default = child.get("default") or {}
            yield from (
                (name, {"default": default[name.rsplit(".", 1)[1]]} | leaf if child.get("required") else leaf)
                for name, leaf in _flat(child, f"{prefix}{key}.")
            )
        else:
            yield f"{prefix}{key}", child


def _table(rows: Any) -> list[str]:
    lines = ["| key | default | accepted | meaning |", "|---|---|---|---|"]
    for name, node in rows:
        words = accepted(node).replace("|", "\\|")
        lines.append(f"| `{name}` | `{shown(node['default'])}` | {words} | {node['description']} |")
    return lines
