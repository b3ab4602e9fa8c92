"""The MLflow model registry: one version a trained pruner, and which of them is the champion.

The champion is the version to use. A new one takes its place only where both its quality and its speed were measured
to be higher, on the same test examples, prompt length and machine; what was compared, and with what result, stands in
the version's tags. Doing this twice for one pruner is doing it once.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdtp.pipeline.mlflow_store import Store

CHAMPION, CHALLENGER = "champion", "challenger"
# What two versions must have in common to be compared.
SAME = ("weights_sha256", "test_sha256", "tasks", "prompt_tokens", "timed_on")
_PRUNER = "sdtp.pruner_sha256"


def register(store: Store, name: str, folder: Path, pruner: str, evidence: Mapping[str, Any]) -> str:
    """Registers a pruner, unless it is there already, and decides about the champion; gives the version's number.

    name: of the registered model, one for each language model. folder: an MLflow model, see `packaging`. pruner: where
    the training step wrote it, as `mounts.place` names it, which tells the run it came from. evidence: `pruner_sha256`,
    `quality`, `speed`, what `SAME` names, and whatever else belongs in the tags; one whose `quality` is None is never
    the champion.
    """
    tags = {f"sdtp.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in evidence.items()}
    with store.writing():
        version = _version(store, name, tags[_PRUNER]) or _create(store, name, folder, pruner, tags)
        present = _champion(store, name)
        if evidence["quality"] is None:
            wins, reason = False, "not compared: no task has a quality"
        elif present is None or str(present.version) == version:  # a number or text, as the store is
            wins, reason = True, "no other champion"
        else:
            wins, reason = beats(tags, present.tags)
            reason = f"{reason} (version {present.version})"
        for key, value in {**tags, "sdtp.decision": reason}.items():
            store.client.set_model_version_tag(name, version, key, value)
        store.client.set_registered_model_alias(name, CHAMPION if wins else CHALLENGER, version)
        if wins and version in _holders(store, name, CHALLENGER):
            store.client.delete_registered_model_alias(name, CHALLENGER)
    return version


def beats(new: Mapping[str, str], present: Mapping[str, str]) -> tuple[bool, str]:
    """Whether a version with tags `new` takes the place of one with tags `present`, and why, in a few words."""
    for key in SAME:
        if new.get(f"sdtp.{key}") != present.get(f"sdtp.{key}"):
            return False, f"not compared: {key} differs from the champion's"
    said, wins = [], True
    for key in ("quality", "speed"):
        mine, theirs = float(new[f"sdtp.{key}"]), float(present[f"sdtp.{key}"])
        wins = wins and mine > theirs
        said.append(f"{key} {mine:.4g} against {theirs:.4g}")
    return wins, f"{'wins' if wins else 'does not win'}: {', '.join(said)}"


def _ensure_registered(store: Store, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(name, description="Trained token pruners, see docs/tracking.md.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version(store: Store, name: str, pruner: str) -> str | None:
    """The version of a pruner; what MLflow made beyond the first, its server's answer having been lost, is deleted."""
    found = store.client.search_model_versions(f"name = '{name}'")
    numbers = sorted(int(one.version) for one in found if one.tags.get(_PRUNER) == pruner)
    for extra in numbers[1:]:
        store.client.delete_model_version(name, str(extra))
    return str(numbers[0]) if numbers else None


def _create(store: Store, name: str, folder: Path, pruner: str, tags: Mapping[str, str]) -> str:
    from mlflow.entities import LoggedModelOutput

    trained = store.runs_of(pruner, "attributes.start_time DESC", 1)
    run_id = trained[0].info.run_id if trained else None
    # MLflow takes fewer characters here than in the name of a registered model: no dot, as in Qwen2.5-7B.
    logged_name = re.sub(r"[/:.%\"']", "-", name)
    models = store.client.search_logged_models([store.experiment_id], f"name = '{logged_name}'")
    model = next((one for one in models if one.tags.get(_PRUNER) == tags[_PRUNER]), None)
    if model is None:
        model = store.client.create_logged_model(
            store.experiment_id, logged_name, source_run_id=run_id, tags=dict(tags), model_type="token pruner"
        )
        if run_id is not None:
            store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    store.client.log_model_artifacts(model.model_id, str(folder))
    store.client.finalize_logged_model(model.model_id, "READY")
    _ensure_registered(store, name)
    with store.named_by_the_environment():
        store.client.create_model_version(
            name, f"models:/{model.model_id}", run_id, tags={_PRUNER: tags[_PRUNER]}, model_id=model.model_id
        )
    version = _version(store, name, tags[_PRUNER])
    if version is None:
        raise RuntimeError(f"MLflow made a version of {name} and does not find it")
    return version


def _champion(store: Store, name: str) -> Any | None:
    holders = _holders(store, name, CHAMPION)
    return store.client.get_model_version(name, holders[0]) if holders else None


def _holders(store: Store, name: str, alias: str) -> list[str]:
    aliases = store.client.get_registered_model(name).aliases
    return [str(aliases[alias])] if alias in aliases else []
