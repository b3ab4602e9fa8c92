"""Small tokenizers made in memory, with the ways of real ones: byte-level pieces, a BOS token or none, a template."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "The people of the United States and the Congress of the country met in the city of Washington.",
    "Question: What is the value of the answer? Read the text, then answer the question. Text: word word word",
]
TURNS = (
    "{% for m in messages %}[turn]{{ m['role'] }}\n{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[turn]assistant\n{% endif %}"
)


# What tells a step where it reports to.
TRACKING = ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE")


@pytest.fixture
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps report to nobody, whatever the environment says."""
    for name in TRACKING:
        monkeypatch.delenv(name, raising=False)


def as_in_the_workflow(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    """The environment that the workflow gives the steps of run `default`, whose files lie in `run_folder`."""
    for name in TRACKING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDTP_PARENT_RUN_FILE", str(run_folder / "mlflow-parent.json"))
    monkeypatch.setenv("SDTP_EXPERIMENT", "sdtp")
    monkeypatch.setenv("SDTP_RUN", "default")


@pytest.fixture
def python_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Factory: `python_process(code, *arguments)` runs code in a process, with pipes; it is killed after the test."""
    started = []

    def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """Factory: `make_tokenizer(adds_bos=False, template=None)`; a template `TURNS` prints no BOS, "[bos]" + it does."""

    def make(adds_bos: bool = False, template: str | None = None) -> PreTrainedTokenizerBase:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            CORPUS,
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=["[bos]", "[turn]", "[end]"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(single="[bos] $A", special_tokens=[("[bos]", 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[bos]" if adds_bos else None)
        tokenizer.add_special_tokens({"additional_special_tokens": ["[bos]", "[turn]", "[end]"]})
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def corpus_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Factory: installs a distribution that ships text documents, and whose import fails, in a folder on the path."""

    def install(name: str, documents: dict[str, str], licence: str = "CC0-1.0") -> Path:
        site = tmp_path / f"site-{name}"
        package = site / name
        (package / "texts").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        for document, text in documents.items():
            (package / "texts" / f"{document}.txt").write_text(text, encoding="utf-8")
        information = site / f"{name}-1.5.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.5\nLicense: {licence}\n"
        )
        (information / "notes.txt").write_text("not a document")
        listed = sorted(path for path in site.rglob("*") if path.is_file())
        (information / "RECORD").write_text("".join(f"{path.relative_to(site)},,\n" for path in listed))
        monkeypatch.syspath_prepend(str(site))
        return package

    return install
