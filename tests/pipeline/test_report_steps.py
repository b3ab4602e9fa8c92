"""The steps figures and report on the files of a small made-up run, as the workflow calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdtp.errors import UserError
from sdtp.pipeline.figures import FIGURES
from sdtp.pipeline.files import sha256_file, write_jsonl
from sdtp.pipeline.steps import figures, report
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pipeline import synthetic_run

WORDS = ["<unk>", "union", "state", "4711", "strong", "Harbour"]
PROMPT = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """results/<run> up to the tables."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "model")
    manifest = {
        "source": {"kind": "local", "ref": "tiny"},
        "parameters": 1000,
        "trust_remote_code": False,
        "sha256": "0",
    }
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))

    for split, rows in {
        "train": [("t-0", "continuation"), ("t-1", "retrieval")],
        "heldout": [("h-0", "continuation")],
        "test": [("r-0", "retrieval"), ("c-0", "continuation")],
    }.items():
        Dataset.from_list(
            [
                {"id": name, "task": task, "prompt_ids": [1 + i % 5 for i in range(PROMPT)], "response_ids": [3],
                 "prompt": "", "response": "", "source": ""}
                for name, task in rows
            ]
        ).save_to_disk(tmp_path / ("test-data" if split == "test" else "data") / split)  # fmt: skip
    counts = {"n_total": 2, "n_skipped": 0, "n_left": 0, "n_used": 2}
    for name, splits in (("data", {"train": {"rows": counts}}), ("test-data", {"test": {"rows": counts}})):
        (tmp_path / name / "manifest.json").write_text(json.dumps({"content_sha256": "1", "splits": splits}))

    (tmp_path / "saliency").mkdir()
    scores = [torch.tensor(score) for score in synthetic_run.saliency(3, PROMPT)]
    save_file({"t-0": scores[0], "h-0": scores[1]}, tmp_path / "saliency" / "shard-0.safetensors")
    save_file({"t-1": scores[2]}, tmp_path / "saliency" / "shard-1.safetensors")
    files = [f"shard-{number}.safetensors" for number in range(2)]
    index = {
        "reduction": "abs", "target": "loss", "layers": list(synthetic_run.LAYERS),
        "model_sha256": "0", "data_sha256": "1",
        "examples": [
            {"id": name, "shard": file, "tokens": PROMPT}
            for name, file in (("t-0", files[0]), ("t-1", files[1]), ("h-0", files[0]))
        ],
        "shards": [{"file": file, "sha256": sha256_file(tmp_path / "saliency" / file)} for file in files],
    }  # fmt: skip
    (tmp_path / "saliency" / "index.json").write_text(json.dumps(index))

    schedule = PruningSchedule(synthetic_run.LAYERS, (0.9, 0.81, 0.73))
    TokenPruner(schedule, scorers.Recent()).save_pretrained(tmp_path / "pruner")
    for name in ("training", "generations", "tables"):
        (tmp_path / name).mkdir()
    synthetic_run.history().to_csv(tmp_path / "training" / "history.csv", index=False)
    synthetic_run.latency().to_csv(tmp_path / "tables" / "latency.csv", index=False)
    quality = synthetic_run.quality()
    quality.to_csv(tmp_path / "tables" / "quality.csv", index=False)
    synthetic_run.comparisons(quality).to_csv(tmp_path / "tables" / "comparisons.csv", index=False)
    for ratio in synthetic_run.RATIOS:
        of_ratio = [row for row in synthetic_run.generations(PROMPT) if row["keep_ratio"] == ratio]
        write_jsonl(tmp_path / "generations" / f"ratio-{ratio}.jsonl", of_ratio)
    (tmp_path / "benchmark").mkdir()
    for ratio in synthetic_run.RATIOS:
        timing = {
            "device": "cpu", "dtype": "float32", "attention": "sdpa", "versions": {"torch": "2.13.0"}, "warmup": 3,
        }  # fmt: skip
        (tmp_path / "benchmark" / f"ratio-{ratio}.json").write_text(json.dumps(timing))
    return tmp_path


def common(folder: Path) -> list[str]:
    generations = [str(folder / "generations" / f"ratio-{ratio}.jsonl") for ratio in synthetic_run.RATIOS]
    return [
        "--settings", json.dumps({"run": "tiny"}), "--model", str(folder / "model"), "--data", str(folder / "data"),
        "--test-data", str(folder / "test-data"),
        "--history", str(folder / "training" / "history.csv"), "--generations", *generations,
        "--latency", str(folder / "tables" / "latency.csv"), "--quality", str(folder / "tables" / "quality.csv"),
        "--saliency", str(folder / "saliency" / "index.json"),
    ]  # fmt: skip


def draw(folder: Path) -> None:
    tables = [
        part for name in ("sparsity", "foresight") for part in (f"--{name}", str(folder / "tables" / f"{name}.csv"))
    ]
    figures.main([*common(folder), *tables, "--output", str(folder / "figures")])


def write(folder: Path) -> str:
    timings = [str(folder / "benchmark" / f"ratio-{ratio}.json") for ratio in synthetic_run.RATIOS]
    report.main(
        [*common(folder), "--benchmarks", *timings, "--pruner", str(folder / "pruner"),
         "--comparisons", str(folder / "tables" / "comparisons.csv"),
         "--figures", str(folder / "figures"), "--output", str(folder / "report.html"),
         "--metrics", str(folder / "metrics" / "report.json")]
    )  # fmt: skip
    return (folder / "report.html").read_text("utf-8")


def test_figures_then_report(folder: Path) -> None:
    draw(folder)
    drawn = sorted(path.name for path in (folder / "figures").iterdir() if not path.name.startswith("."))
    assert drawn == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png"))
    # The figures' numbers, of all three examples that have labels.
    for name in ("sparsity", "foresight"):
        table = pd.read_csv(folder / "tables" / f"{name}.csv")
        assert (len(table), set(table["n"])) == ({"sparsity": 9, "foresight": 3}[name], {3})
    html = write(folder)
    assert html.count("data:image/svg+xml;base64,") == len(FIGURES)
    # Both examples have 120 tokens: the first is shown. The pruner's stages name the layers.
    assert "A real prompt of 120 tokens (<code>r-0</code>)" in html
    assert "before decoder layers 4, 7, 10" in html
    assert "Timed on: cpu, float32, sdpa attention, torch 2.13.0." in html
    assert "3 rounds of warm-up" in html
    assert "1 retrieval prompts of 120 tokens, 1 continuation prompts of 120 tokens" in html
    assert json.loads((folder / "metrics" / "report.json").read_text())["bytes"] == len(html.encode())


def test_temporary_files_of_other_steps_in_the_folder_stay(folder: Path) -> None:
    (folder / "figures").mkdir()
    another = folder / "figures" / ".tmp-0123abcd-harness.svg"
    own = folder / "figures" / ".tmp-0123abcd-quality.png"
    for path in (another, own):
        path.write_text("half")
    draw(folder)
    assert another.read_text() == "half"
    assert not own.exists()


def test_heat_map_shows_the_first_retrieval_example(folder: Path) -> None:
    assert figures.shown_example(folder / "data", folder / "model", ["t-0", "t-1", "h-0"]) == (
        "t-1", [WORDS[1 + index % 5] for index in range(PROMPT)],
    )  # fmt: skip
    assert figures.shown_example(folder / "data", folder / "model", ["h-0", "t-0"])[0] == "h-0"
    with pytest.raises(UserError, match="no example r-0, which has saliency"):
        figures.shown_example(folder / "data", folder / "model", ["r-0"])


def test_kept_shares_are_means_over_the_examples_of_a_ratio(tmp_path: Path) -> None:
    rows = [
        {"keep_ratio": 0.5, "prompt_tokens": 10, "kept": [[0, 1, 2, 3, 4], [0, 1]]},
        {"keep_ratio": 0.5, "prompt_tokens": 4, "kept": [[0, 1, 2], [0, 1]]},
        {"keep_ratio": 0.9, "prompt_tokens": 4, "kept": [[0, 1, 2, 3], [0, 1, 2]]},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    shares = figures.kept_shares([tmp_path / "rows.jsonl"])
    assert list(shares) == [0.9, 0.5]
    assert shares[0.5] == pytest.approx([(0.5 + 0.75) / 2, (0.2 + 0.5) / 2])


def test_ratios_timed_on_different_machines_are_refused(folder: Path) -> None:
    draw(folder)
    path = folder / "benchmark" / f"ratio-{synthetic_run.RATIOS[-1]}.json"
    timing = path.read_text()
    path.write_text(timing.replace("2.13.0", "2.14.0"))
    with pytest.raises(UserError, match=r"torch 2\.14\.0.*one machine and as many rounds for all"):
        write(folder)
    path.write_text(timing.replace('"warmup": 3', '"warmup": 1'))
    with pytest.raises(UserError, match=r"after 1 rounds of warm-up.* after 3;"):
        write(folder)


def test_the_saliency_figure_and_its_caption_name_the_reduction(folder: Path) -> None:
    index = folder / "saliency" / "index.json"
    index.write_text(index.read_text().replace('"abs"', '"l2"'))
    draw(folder)
    assert "√Σ (gradient × input)², summed over the hidden dimension" in write(folder)


def test_a_figure_or_generation_that_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"figures: no saliency\.svg"):
        write(folder)
    for path in (folder / "generations").iterdir():
        path.write_text("")
    with pytest.raises(UserError, match=r"ratio-0\.9\.jsonl.*: no rows"):
        write(folder)
