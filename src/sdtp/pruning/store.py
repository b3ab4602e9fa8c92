"""A pruner on disk: `pruner.json` for settings, `pruner.safetensors` for weights; nothing is unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from sdtp.disk import sync, temporary_sibling
from sdtp.pruning import scorers
from sdtp.pruning.fingerprint import Fingerprint
from sdtp.pruning.plain import from_plain
from sdtp.pruning.schedule import PruningSchedule

SETTINGS, WEIGHTS = "pruner.json", "pruner.safetensors"
_FORMAT = 5
_PLAIN: dict[str, type[scorers.Scorer]] = {cls.__name__: cls for cls in scorers.BASELINES}
_KINDS = f"accepted are Learned, {', '.join(_PLAIN)}"
_LARGEST = 2**24  # of a size in the settings: far beyond any model's, and no shape made of it overflows


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of a learned scorer, see `scorers.Learned`."""

    hidden_size: int
    stages: int
    width: int
    position: bool
    question_rank: int
    neighbours: int
    recency: float

    @classmethod
    def of(cls, scorer: scorers.Learned) -> _Sizes:
        return cls(**{field.name: getattr(scorer, field.name) for field in dataclasses.fields(cls)})

    def build(self) -> scorers.Learned:
        return scorers.Learned(**dataclasses.asdict(self))


def learned_settings(scorer: scorers.Learned) -> dict[str, Any]:
    """All that decides a learned scorer's scores besides its weights, as it is stored: JSON values by name."""
    return dataclasses.asdict(_Sizes.of(scorer))


def save(
    folder: Path, schedule: PruningSchedule, scorer: scorers.Scorer, fingerprint: Fingerprint | None = None
) -> None:
    """Write a pruner; see `TokenPruner.save_pretrained`.

    A crash leaves the old pruner, the new one, or a folder without `pruner.json`: never parts of both.

    Args:
        folder: made where missing; what it holds of another pruner is replaced.
        schedule: which layers prune.
        scorer: who decides.
        fingerprint: of the model the scorer was trained for; None if it is for any.

    Raises:
        ValueError: the scorer has no form on disk, `load` would refuse what it holds, or `folder` is a file.
    """
    weights = None
    if type(scorer) is scorers.Learned:
        described = {"kind": "Learned", **learned_settings(scorer)}
        weights = {name: value.detach().cpu().contiguous() for name, value in scorer.state_dict().items()}
        for name, value in weights.items():
            _check_values(name, value)
    elif type(scorer) in _PLAIN.values():
        described = {"kind": type(scorer).__name__, **dataclasses.asdict(scorer)}  # type: ignore[call-overload]
    else:
        raise ValueError(f"{type(scorer).__name__} cannot be saved: {_KINDS}")
    settings = {
        "format": _FORMAT,
        "schedule": schedule.to_dict(),
        "scorer": described,
        "question_conditioned": scorer.question_conditioned,
    }
    if fingerprint is not None:
        settings["fingerprint"] = dataclasses.asdict(fingerprint)
    try:
        text = json.dumps(settings, indent=2)
        _parse(text)  # what could not be read back is not written
    except (TypeError, ValueError) as error:
        raise ValueError(f"the pruner cannot be saved: {error}") from error
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list of numbers a line
    _write(folder, (text + "\n").encode(), None if weights is None else safetensors.torch.save(weights))


def load(folder: Path) -> tuple[PruningSchedule, scorers.Scorer, Fingerprint | None]:
    """Read what `save` wrote; see `TokenPruner.from_pretrained`.

    Returns:
        The schedule, the scorer, and the fingerprint of the model it was trained for, if the pruner carries one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit the other; named with the fault.
    """
    with _named(folder / SETTINGS):
        schedule, scorer, fingerprint = _parse((folder / SETTINGS).read_text(encoding="utf-8"))
    if isinstance(scorer, _Sizes):
        with _named(folder / WEIGHTS):
            return schedule, _learned(folder / WEIGHTS, scorer), fingerprint
    return schedule, scorer, fingerprint


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what may go wrong with the contents of a file into a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; a pruner is a folder with {SETTINGS}") from None
    except NotADirectoryError:
        raise ValueError(f"{path.parent} is a file: the folder that holds {path.name} is needed") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: a file is needed") from None
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply for the settings of a pruner") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(text: str) -> tuple[PruningSchedule, scorers.Scorer | _Sizes, Fingerprint | None]:
    """The contents of `pruner.json`; of a learned scorer, the sizes.

    Raises:
        ValueError: a fault, named with its key.
    """
    settings = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    if type(settings) is not dict:
        raise ValueError(f"it holds a {type(settings).__name__}: an object is needed")
    if type(settings.get("format")) is not int or settings["format"] != _FORMAT:
        raise ValueError(f"format is {settings.get('format')!r}: {_FORMAT} is accepted")
    needed = {"format", "schedule", "scorer", "question_conditioned"}
    if settings.keys() - {"fingerprint"} != needed:
        raise ValueError(f"it has keys {sorted(settings)}: {sorted(needed)} are needed, fingerprint is accepted")
    schedule = from_plain(PruningSchedule, settings["schedule"], "schedule")
    scorer, conditioned = _scorer(settings["scorer"], schedule)
    if settings["question_conditioned"] is not conditioned:
        raise ValueError(
            f"question_conditioned is {settings['question_conditioned']!r}: it is {conditioned} of "
            f"{settings['scorer']['kind']}"
        )
    fingerprint = None
    if "fingerprint" in settings:
        fingerprint = from_plain(Fingerprint, settings["fingerprint"], "fingerprint")
        if isinstance(scorer, _Sizes) and scorer.hidden_size != fingerprint.hidden_size:
            raise ValueError(
                f"fingerprint.hidden_size is {fingerprint.hidden_size}, scorer.hidden_size is {scorer.hidden_size}: "
                "they are one model's"
            )
    return schedule, scorer, fingerprint


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
    return values


def _constant(name: str) -> Any:
    raise ValueError(f"it holds {name}: numbers must be finite")


def _scorer(described: Any, schedule: PruningSchedule) -> tuple[scorers.Scorer | _Sizes, bool]:
    """What the settings say of the scorer, and whether a scorer of this kind is question-conditioned."""
    if type(described) is not dict or "kind" not in described:
        raise ValueError(f"scorer is {described!r}: an object with a kind is needed")
    kind, fields = described["kind"], {key: value for key, value in described.items() if key != "kind"}
    if kind == "Learned":
        sizes = from_plain(_Sizes, fields, "scorer")
        for name, size in dataclasses.asdict(sizes).items():
            if type(size) is int and not (name in ("hidden_size", "width")) <= size <= _LARGEST:
                raise ValueError(f"scorer.{name} is {size}: a size up to {_LARGEST} is accepted")
        if sizes.stages != schedule.stages:
            raise ValueError(f"scorer.stages is {sizes.stages}, but the schedule has {schedule.stages}")
        with torch.device("meta"):  # refuses sizes no scorer has, and allocates nothing
            return sizes, sizes.build().question_conditioned
    if not isinstance(kind, str) or kind not in _PLAIN:
        raise ValueError(f"scorer.kind is {kind!r}: {_KINDS}")
    scorer = from_plain(_PLAIN[kind], fields, "scorer")
    return scorer, scorer.question_conditioned


def _learned(path: Path, sizes: _Sizes) -> scorers.Learned:
    """The scorer of these sizes with the weights of a safetensors file, frozen.

    Raises:
        SafetensorError, ValueError: the file is not whole, or holds other tensors than the scorer has.
    """
    with torch.device("meta"):  # allocates nothing before the file has shown that it fits
        scorer = sizes.build()
    expected = {name: tuple(value.shape) for name, value in scorer.state_dict().items()}
    with open(path, "rb"):  # names what is wrong with the path, as safetensors does not
        pass
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"it is not a whole safetensors file ({error})") from error
    with file as tensors:
        found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(
                    f"tensor {name} has shape {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
                )
        weights = {name: tensors.get_tensor(name) for name in expected}
    for name, value in weights.items():
        _check_values(name, value)
    scorer.to_empty(device="cpu").load_state_dict(weights)
    return scorer.eval().requires_grad_(False)


def _check_values(name: str, value: torch.Tensor) -> None:
    if value.dtype != torch.float32:
        raise ValueError(f"tensor {name} is of {value.dtype}: torch.float32 is needed")
    if not value.isfinite().all():
        raise ValueError(f"tensor {name} holds values that are not finite")


def _write(folder: Path, settings: bytes, weights: bytes | None) -> None:
    """Put the two files into place, each whole; without `weights`, an older pruner's file of them is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder} is a file or inside one: a folder is needed") from None
    with contextlib.ExitStack() as temporaries:
        new = {
            name: temporaries.enter_context(_temporary(folder / name, content))
            for name, content in ((WEIGHTS, weights), (SETTINGS, settings))
            if content is not None
        }
        (folder / SETTINGS).unlink(missing_ok=True)  # from here until the end there is no pruner in the folder
        (folder / WEIGHTS).unlink(missing_ok=True)
        sync(folder)
        for name, temporary in new.items():
            os.replace(temporary, folder / name)
        sync(folder)


@contextlib.contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside `path` with the content, on the disk; removed at the end where it was not moved away."""
    temporary = temporary_sibling(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
