"""Checks that the saliency shards together cover the data once, and writes their index."""

import argparse
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.data_folder import TRAINING, load_split
from sdtp.pipeline.files import canonical_json, sha256_file, write_atomically
from sdtp.pipeline.shards import data_hash, read_shard
from sdtp.pipeline.step import step


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments."""
    parser = argparse.ArgumentParser(prog="sdtp saliency-index", description=__doc__)
    parser.add_argument("--settings", required=True, metavar="JSON", help="none are used: {}")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data folder the shards were made from")
    parser.add_argument("--shards", required=True, type=Path, nargs="+", metavar="FILE", help="all shards, in order")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="index to write, beside the shards")
    parser.add_argument("--metrics", required=True, type=Path, metavar="FILE", help="metrics to write")
    args = parser.parse_args(argv)
    with step("saliency-index", args, outputs=[args.output]) as log:
        tokens = {
            example["id"]: len(example["prompt_ids"]) for split in TRAINING for example in load_split(args.data, split)
        }
        index = build_index(args.shards, tokens, data_hash(args.data))
        with write_atomically(args.output) as temporary:
            temporary.write_text(canonical_json(index) + "\n", encoding="utf-8")
        log.metric("examples", len(index["examples"]))
        log.metric("shards", len(index["shards"]))


def build_index(shards: list[Path], tokens: dict[str, int], data_sha256: str) -> dict:
    """The index of shards that cover the examples exactly once; every label is read and checked.

    Args:
        shards: files of one folder, all of them and in order.
        tokens: prompt tokens of every example that must have labels, by id.
        data_sha256: content hash of the data the ids come from.

    Raises:
        UserError: a shard that is missing, damaged or in another's place; shards made with different settings, models
            or data; an example twice, missing or unknown; labels of another number of stages or tokens.
    """
    description: dict | None = None
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number, path in enumerate(shards):
        own, (shard, count), shapes = read_shard(path)
        if (shard, count) != (number, len(shards)):
            raise UserError(f"{path}: this is shard {shard} of {count}, but shard {number} of {len(shards)} is needed")
        description = own if description is None else description
        if own != description:
            key = next(key for key in sorted(own.keys() | description.keys()) if own.get(key) != description.get(key))
            raise UserError(f"{path}: {key} is {own.get(key)}, but {description.get(key)} in {shards[0]}")
        for example, shape in shapes.items():
            if example in found:
                raise UserError(f"{path}: example {example!r} is in {found[example][0]} as well")
            found[example] = (path.name, shape)
    assert description is not None  # argparse asks for one shard at least
    if description["data_sha256"] != data_sha256:
        raise UserError(f"data_sha256 of the shards is {description['data_sha256']}, but the data's is {data_sha256}")
    if missing := sorted(tokens.keys() - found.keys()):
        raise UserError(
            f"{len(missing)} examples have no saliency, {missing[0]!r} for one: run the saliency step again"
        )
    if unknown := sorted(found.keys() - tokens.keys()):
        raise UserError(f"{len(unknown)} examples are not in the data, {unknown[0]!r} for one")
    for example, (name, shape) in found.items():
        expected = (len(description["layers"]), tokens[example])
        if shape != expected:
            raise UserError(f"{name}: saliency of {example!r} has shape {shape}, but {expected} is [stages, tokens]")
    return {
        **description,
        # In the data's order, whatever order the shards came in.
        "examples": [{"id": name, "shard": found[name][0], "tokens": count} for name, count in tokens.items()],
        "shards": [{"file": path.name, "sha256": sha256_file(path)} for path in shards],
    }
