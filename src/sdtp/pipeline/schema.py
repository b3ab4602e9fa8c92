"""The config schema at work: fills defaults, refuses bad values in one line, and writes the config's manual."""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jsonschema
import yaml

from sdtp.errors import UserError
from sdtp.evaluation.names import LEAST_REPORTED, LEAST_TO_TUNE, TUNED
from sdtp.pipeline.schema_words import Schema, accepted, kinds, shown

# By libyaml, where PyYAML was built with it: every start of the workflow reads the schema more than once.
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A variant's name is a folder's and a column's value.
VARIANT_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
# What leads to a pruner, and so may differ between variants that share the run's model and data.
VARIED = ("pruning", "saliency", "training")
# Of these blocks, what belongs to the comparison: variants meet at the same ratios, and shards change no label.
SHARED = ("pruning.keep_ratios", "saliency.shards")
# Blocks with methods that are measured.
METHODS_IN = ("evaluation", "peers", "suites", "harness")
# Of one key; no configuration has so many.
MOST_VALUES = 10_000


def load_schema(path: str | Path) -> Schema:
    """Reads a JSON Schema written in YAML, with each `$ref` into `$defs` replaced by what it refers to."""
    schema = yaml.load(Path(path).read_text(encoding="utf-8"), FAST_LOADER)
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: inline(value) for key, value in node.items()}
        reference = node.pop("$ref", None)
        return node if reference is None else inline(definitions[reference.removeprefix("#/$defs/")]) | node

    resolved = inline(schema)
    assert isinstance(resolved, dict)
    return resolved


def resolve(config: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """A valid copy of `config` in which every key is present and every number has the type the schema gives it.

    60 and 60.0 become the same step count, so that writing a number otherwise reruns nothing.

    Raises:
        UserError: one line per fault: the key, its value, and what is accepted.
    """
    _refuse_multitudes(config)
    filled = _with_defaults(config, schema)
    _refuse(_faults(filled, schema))
    resolved = _with_types(filled, schema)
    assert isinstance(resolved, dict)
    return resolved


def resolve_variants(config: Mapping[str, Any], schema: Schema) -> dict[str, dict[str, Any]]:
    """The whole configuration of each of `config["variants"]`, by name, in the order written.

    Each is the run's own with the variant's changes laid over it key by key (lists are replaced), valid and typed as
    `resolve` makes it, without the key `variants`.

    Args:
        config: a resolved configuration.

    Raises:
        UserError: one line per fault, which names the variant and the key: a name that cannot name a folder, a change
            of what the variants share, or a value that `resolve` refuses.
    """
    run = {key: value for key, value in config.items() if key != "variants"}
    faults, merged = [], {}
    for name, changes in config["variants"].items():
        where = f"variants.{name}"
        if not re.fullmatch(VARIANT_NAME, str(name)):
            faults.append(f"{where} = {shown(changes)}: the name must match `{VARIANT_NAME}`")
        own = _shared_keys(changes)
        faults += [
            f"{where}.{key} = {shown(value)}: the variants share this; a variant may change {', '.join(VARIED)}, "
            f"except {' and '.join(SHARED)}"
            for key, value in own.items()
        ]
        merged[str(name)] = _with_defaults(_laid_over(run, changes), schema)
        if not own:
            faults += [f"{where}.{line}" for line in _faults(merged[str(name)], schema)]
    _refuse(faults)
    return {
        name: {key: value for key, value in _with_types(filled, schema).items() if key != "variants"}
        for name, filled in merged.items()
    }


def _refuse_multitudes(config: Mapping[str, Any]) -> None:
    """Refuse what a few lines of YAML make endless, before anything walks through it or prints it."""
    for key, value in config.items():
        ahead, seen = [value], 0
        while ahead:
            one = ahead.pop()
            seen += 1 + (len(one) // 100 if isinstance(one, str) else 0)
            if seen > MOST_VALUES:
                raise UserError(
                    f"{key}: holds more than {MOST_VALUES} values, an alias (*) counted with all that it stands for; "
                    "accepted: fewer, and none that holds itself"
                )
            if isinstance(one, Mapping):
                ahead += one.values()
            elif isinstance(one, list):
                ahead += one


def _shared_keys(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a variant's changes those it may not make, by dotted name."""
    shared = {}
    for block, inside in changes.items():
        if block not in VARIED:
            shared[str(block)] = inside
        elif isinstance(inside, Mapping):
            shared |= {f"{block}.{key}": value for key, value in inside.items() if f"{block}.{key}" in SHARED}
    return shared


def _laid_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _laid_over(below, value)
        result[key] = value
    return result


def _faults(filled: Mapping[str, Any], schema: Schema) -> list[str]:
    """One line for each fault of a configuration whose defaults are filled in."""
    validator = jsonschema.Draft202012Validator(schema)
    faults = [line for error in validator.iter_errors(filled) for line in _explain(error)]
    if not faults:
        faults += _disagreements(filled)
    return faults + [
        f"{key} = {shown(value)}: must be finite"
        for key, value in leaves(filled)
        if any(isinstance(one, float) and not math.isfinite(one) for one in (value if type(value) is list else [value]))
    ]


def _disagreements(filled: Mapping[str, Any]) -> list[str]:
    """One line for each value that is good by itself and not with another."""
    faults = []
    gpus, batch = filled["training"]["gpus"], filled["training"]["batch_size"]
    if batch < gpus:
        faults.append(
            f"training.batch_size = {batch}: must be at least training.gpus = {gpus}, or GPUs are idle in every step"
        )
    heldout = filled["data"]["train"]["heldout"]
    if heldout < LEAST_TO_TUNE and any(TUNED in filled[block]["methods"] for block in METHODS_IN):
        faults.append(
            f"data.train.heldout = {heldout}: method {TUNED} needs {LEAST_TO_TUNE} or more, because half of them "
            f"choose and fewer than {LEAST_REPORTED} others can show no difference"
        )
    return faults


def _refuse(faults: list[str]) -> None:
    if faults:
        raise UserError("the configuration is not valid:\n" + "\n".join(f"  {line}" for line in sorted(faults)))


def check_sources(overlay: Mapping[str, Any], schema: Schema) -> None:
    """Refuses an overlay (a second config file, or `--config`) that states some keys of a source and not all.

    Snakemake merges an overlay into the default config key by key: what it leaves out stays, so a hub id would keep the
    checksum of the default run's file.

    Raises:
        UserError: naming the source and the missing keys.
    """
    faults = []
    for path, node in _objects(schema):
        value = _lookup(overlay, path)
        missing = [key for key in node.get("required", []) if isinstance(value, dict) and key not in value]
        if missing:
            faults.append(
                f"{'.'.join(path)} = {shown(value)}: also needs {', '.join(missing)}; a file given on top of the "
                "default config states a source whole, or what it leaves out would stay from the default"
            )
    if faults:
        raise UserError("the configuration is not valid:\n" + "\n".join(f"  {line}" for line in faults))


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that is not a block, by its dotted name, in the order written."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with_defaults(value: Any, node: Schema) -> Any:
    if node.get("type") != "object" or not isinstance(value, Mapping):
        return copy.deepcopy(value)
    filled = dict(value)
    for key, child in node.get("properties", {}).items():
        if key in filled or "default" in child:
            filled[key] = _with_defaults(filled.get(key, child.get("default")), child)
    return filled


def _with_types(value: Any, node: Schema) -> Any:
    kind = next((kind for kind in kinds(node) if kind != "null"), None)
    if value is None:
        return None
    if kind == "object" and isinstance(node["additionalProperties"], Mapping):
        return {str(name): copy.deepcopy(child) for name, child in value.items()}  # names of the user's own
    if kind == "object":
        # In the schema's order, whatever the order in the file.
        return {key: _with_types(value[key], child) for key, child in node["properties"].items()}
    if kind == "array":
        return [_with_types(item, node["items"]) for item in value]
    if kind == "integer":
        return int(value)
    return float(value) if kind == "number" else value


def _explain(error: jsonschema.ValidationError) -> Iterator[str]:
    key = ".".join(str(part) for part in error.absolute_path)
    # The types of jsonschema allow for errors that belong to no schema; those of a validation do.
    node, constraint, instance = cast(Schema, error.schema), cast(Any, error.validator_value), cast(Any, error.instance)
    if error.validator == "additionalProperties":
        known = node["properties"]
        for name in sorted(set(instance) - set(known), key=str):
            where = f"{key}.{name}" if key else name
            yield f"{where} = {shown(instance[name])}: no such key; {key or 'the config'} has {', '.join(known)}"
        return
    if error.validator == "required":
        missing = [name for name in constraint if name not in instance]
        # One error a missing key: each reports its own.
        name = next(name for name in missing if f"'{name}'" in error.message)
        yield f"{key} = {shown(instance)}: needs the key {name}"
        return
    hint = ""
    if isinstance(instance, str) and error.validator == "type" and _is_number(instance):
        hint = (
            f" (YAML reads {instance} as text; write {float(instance)!r})"
            if isinstance(yaml.safe_load(instance), str)
            else " (text, not a number: no quotes in a file; "
            "--config takes no numbers inside a block, use --configfile)"
        )
    yield f"{key} = {shown(instance)}: must be {accepted(node)}{hint}"


def _objects(node: Schema, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Schema]]:
    if "object" in kinds(node):
        yield path, node
        for key, child in node["properties"].items():
            yield from _objects(child, (*path, key))


def _lookup(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
