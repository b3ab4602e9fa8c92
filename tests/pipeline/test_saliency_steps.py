"""The saliency and saliency-index steps, on files, with a tiny model: shards, chunks, kills and the index."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pipeline.chunks import CHUNK_EXAMPLES
from sdtp.pipeline.shards import Labels, map_labels, read_shard, write_labels, write_shard
from sdtp.pipeline.steps import saliency
from sdtp.training.saliency import saliency as compute
from tests.pipeline.killed import carry_out
from tests.pipeline.saliency_run import (
    SETTINGS,
    checkpoints,
    chunks,
    index_of,
    make_run,
    output,
    shard,
    shard_arguments,
)

pytestmark = pytest.mark.usefixtures("no_tracking")

ROOT = Path(__file__).parents[2]
MADE_OF = {
    "reduction": "signed",
    "target": "loss",
    "layers": [1, 3],
    "model_sha256": "m" * 64,
    "data_sha256": "d" * 64,
}


# Prompt tokens of `long_run`'s examples as they are run: the longest, then the batch of the most response tokens, which
# is the only one of three examples; 16, 17 and 7 of them are a chunk.
RUN_ORDER = [49, 13, 12, 11, *range(48, 13, -1), 10]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Path:
    """Five examples of 20 to 24 prompt tokens."""
    make_run(tmp_path, tiny_model(), [20 + number for number in range(5)])
    return tmp_path


@pytest.fixture
def long_run(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Path:
    """Forty examples of 10 to 49 prompt tokens, no two of one length, which are three chunks of one shard."""
    make_run(tmp_path, tiny_model(), [10 + number * 7 % 40 for number in range(40)])
    return tmp_path


def data_rows(run: Path) -> list[dict[str, Any]]:
    return [
        row for split in ("train", "heldout") for row in Dataset.load_from_disk(str(run / "data" / split)).to_list()
    ]


def answer(run: Path, response_tokens: list[int]) -> None:
    """Gives the examples of a run other responses, of these lengths."""
    rows = [{**row, "response_ids": [5] * count} for row, count in zip(data_rows(run), response_tokens, strict=True)]
    for split, part in (("train", rows[:-1]), ("heldout", rows[-1:])):
        shutil.rmtree(run / "data" / split)
        Dataset.from_list(part).save_to_disk(run / "data" / split)


def metrics(run: Path, index: int = 0) -> dict[str, Any]:
    found = json.loads((run / "metrics" / f"s{index}.json").read_text())
    assert isinstance(found, dict)
    return found


class TestShards:
    def test_hold_each_example_once_with_what_made_them(
        self, run: Path, tiny_model: Callable[..., PreTrainedModel]
    ) -> None:
        first, second = load_file(shard(run, 0)), load_file(shard(run, 1))
        assert sorted(first) == ["e0", "e2", "e4"]
        assert sorted(second) == ["e1", "e3"]
        rows = {row["id"]: row for row in data_rows(run)}
        for name, label in {**first, **second}.items():
            prompt, response = (torch.tensor(rows[name][key]) for key in ("prompt_ids", "response_ids"))
            alone = compute(tiny_model(), prompt, response, (1, 3), "signed")
            assert (label - alone).abs().max() <= 1e-5 * alone.abs().max()
        for number, path in enumerate((output(run, 0), output(run, 1))):
            made_of, place, shapes = read_shard(path)
            assert made_of == MADE_OF
            assert place == (number, 2)
            assert shapes == {f"e{n}": (2, 20 + n) for n in range(number, 5, 2)}
        # 22, 24 and 26 tokens run: two of 26 fill a batch of 50 by no more than the limit, 24 and 22 make the other.
        assert metrics(run)["examples"] == 3
        assert metrics(run)["tokens"] == 20 + 22 + 24
        assert metrics(run)["examples_resumed"] == 0
        assert metrics(run)["padding_fraction"] == pytest.approx(1 - 72 / (26 + 2 * 24))
        assert not checkpoints(run, 0).exists()

    @pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
    def test_share_the_tokens_out_evenly_though_tasks_of_other_lengths_take_turns(self, shards: int) -> None:
        lengths = [length for number in range(100) for length in (370 + number % 14, 90 + number % 20)]
        shares = [saliency.share(lengths, shard, shards) for shard in range(shards)]
        assert all(rows == sorted(rows) for rows in shares)
        assert sorted(row for rows in shares for row in rows) == list(range(200))
        tokens = [sum(lengths[row] for row in rows) for rows in shares]
        assert max(tokens) - min(tokens) <= max(lengths)

    def test_the_same_labels_are_the_same_bytes(self, tmp_path: Path) -> None:
        labels = {"b": torch.rand(2, 5), "a": torch.rand(2, 7)}
        write_shard(tmp_path / "one", labels, MADE_OF, 0, 1)
        write_shard(tmp_path / "two", dict(sorted(labels.items())), dict(reversed(MADE_OF.items())), 0, 1)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        with safe_open(tmp_path / "one", framework="pt") as file:
            # Several keys would be written in an order that differs from process to process.
            assert list(file.metadata()) == ["description"]

    def test_more_shards_than_examples_leave_an_empty_one(self, run: Path) -> None:
        shards = [shard(run, number, 6) for number in range(6)]
        assert read_shard(shards[5])[2] == {}
        assert len(json.loads(index_of(run, shards).read_text())["examples"]) == 5

    def test_mapped_labels_are_assembled_without_being_held_in_memory(self, tmp_path: Path) -> None:
        """In a fresh process: 256 MB of labels in 8 chunks become one file, and anonymous memory hardly grows."""
        script = """
import sys, torch
from pathlib import Path
from sdtp.pipeline.chunks import Chunks
from sdtp.pipeline.shards import write_shard

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

folder = Path(sys.argv[1])
shapes = [{f"{chunk}-{n}": (8, 65536) for n in range(16)} for chunk in range(8)]
chunks = Chunks(folder / "chunks", "f", shapes)
for number, names in enumerate(shapes):
    chunks.add(number, {name: torch.full(shape, float(number)) for name, shape in names.items()})
before = anonymous()
again = Chunks(folder / "chunks", "f", shapes)
assert len(again.whole) == 8
labels = again.labels()
write_shard(folder / "shard.safetensors", labels, {}, 0, 1)
print(anonymous() - before, (folder / "shard.safetensors").stat().st_size)
"""
        process = subprocess.run(
            [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert process.returncode == 0, process.stderr
        grown, size = map(int, process.stdout.split())
        assert size > 256 * 2**20
        assert grown < 48 * 2**20  # a chunk is 32

    @pytest.mark.parametrize("index", [-1, 2])
    def test_one_there_is_none_of_is_refused(self, run: Path, index: int) -> None:
        with pytest.raises(UserError, match=f"--shard is {index}: a number from 0 to 1"):
            shard(run, index)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"id": "e1"}, "2 examples have the id 'e1'"),
            ({"response_ids": []}, "example 'e4': response_ids is empty"),
            ({"prompt_ids": []}, "example 'e4': prompt_ids is empty"),
        ],
    )
    def test_examples_that_cannot_have_labels_are_named(self, run: Path, change: dict[str, Any], message: str) -> None:
        (row,) = Dataset.load_from_disk(str(run / "data" / "heldout")).to_list()
        features = Dataset.load_from_disk(str(run / "data" / "heldout")).features
        shutil.rmtree(run / "data" / "heldout")
        Dataset.from_list([{**row, **change}], features).save_to_disk(run / "data" / "heldout")
        with pytest.raises(UserError, match=message):
            shard(run, 0)

    def test_saliency_that_is_not_finite_names_example_and_stage(
        self, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
    ) -> None:
        model = tiny_model()
        make_run(tmp_path, model, [20, 21, 22])
        rows = data_rows(tmp_path)
        # A token of e1 alone overflows, in the embedding that all layers' states come from.
        others = {token for row in rows if row["id"] != "e1" for token in row["prompt_ids"] + row["response_ids"]}
        token = next(token for token in rows[1]["prompt_ids"] if token not in others)
        model.model.embed_tokens.weight.data[token] = torch.inf
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=r"example 'e1': saliency of layer 1 \(stage 0\) is not finite"):
            shard(tmp_path, 0, 1)
        assert not output(tmp_path, 0).exists()

    def test_a_batch_that_needs_more_memory_than_there_is_says_what_needs_less(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

        monkeypatch.setattr("sdtp.pipeline.steps.saliency.batch_saliency", full)
        answer(run, [3, 3, 9, 3, 4])
        # Of 23, 22 and 20 prompt tokens; the second, the longest with its response, runs alone and after the others.
        expected = (
            r"no memory was left on cpu .* 2 examples, 'e3' the first, of up to 23 prompt and 3 response tokens: "
            r"saliency\.gradient_checkpointing: true .* logits of 6 response tokens, a smaller saliency\.batch_tokens"
        )
        with pytest.raises(UserError, match=expected):
            shard(run, 0)
        assert not output(run, 0).exists()

    def test_batches_of_the_longest_example_and_of_the_most_response_tokens_run_first(
        self, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_run(tmp_path, tiny_model(), [34, 10, 40, 38, 36])
        answer(tmp_path, [3, 20, 3, 3, 3])  # 29 tokens run of the second example, fewer than of any other
        true, ran = saliency.batch_saliency, []

        def watched(model: Any, prompts: Any, responses: Any, *others: Any) -> Any:
            ran.append([(len(prompt), len(response)) for prompt, response in zip(prompts, responses, strict=True)])
            return true(model, prompts, responses, *others)

        monkeypatch.setattr(saliency, "batch_saliency", watched)
        shard(tmp_path, 0, 1)
        assert ran == [[(40, 3)], [(10, 20)], [(38, 3)], [(36, 3)], [(34, 3)]]


class TestChunks:
    """A finished step left chunks behind, as one that was killed does; the step runs again."""

    @pytest.fixture
    def killed(self, long_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run whose chunks are all there, and its shard under the name `expected`."""
        with monkeypatch.context() as patch:
            patch.setattr("sdtp.pipeline.chunks.shutil.rmtree", lambda *args, **kwargs: None)
            path = shard(long_run, 0, 1)
        path.rename(long_run / "expected")
        assert [path.name for path in chunks(long_run, 0)] == [
            f"chunk-00000{number}.safetensors" for number in range(3)
        ]
        return long_run

    def again(self, run: Path, **changes: Any) -> int:
        """Runs the step once more; the number of examples it took from chunks. The shard must be the expected one."""
        shard(run, 0, 1, **changes)
        resumed = metrics(run)["examples_resumed"]
        if not changes:
            assert output(run, 0).read_bytes() == (run / "expected").read_bytes()
        assert not checkpoints(run, 0).exists()
        return int(resumed)

    def test_hold_the_most_demanding_examples_first(self, killed: Path) -> None:
        tokens = [sorted(label.shape[1] for label in map_labels(path)[1].values()) for path in chunks(killed, 0)]
        assert len(tokens[0]) == CHUNK_EXAMPLES
        assert tokens == [sorted(RUN_ORDER[:16]), sorted(RUN_ORDER[16:33]), sorted(RUN_ORDER[33:])]

    def test_all_are_taken(self, killed: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="sdtp"):
            assert self.again(killed) == 40
        assert "40 of 40 examples are taken from chunks of an interrupted run" in caplog.text

    @pytest.mark.parametrize(
        "damage", ["truncated", "edited byte", "other label", "not there", "empty", "another's place"]
    )
    def test_a_damaged_one_is_computed_again(self, killed: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
        first, second, _ = chunks(killed, 0)
        content = second.read_bytes()
        with caplog.at_level(logging.INFO, logger="sdtp"):
            match damage:
                case "truncated":
                    second.write_bytes(content[: len(content) // 2])
                case "edited byte":
                    second.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
                case "other label":  # whole in itself, but not of the examples that belong there
                    described, labels = map_labels(second)
                    labels.pop(min(labels))
                    write_labels(second, labels, described)
                case "not there":
                    second.unlink()
                case "empty":
                    second.write_bytes(b"")
                case "another's place":
                    shutil.copyfile(first, second)
            assert self.again(killed) == 40 - 17
        if damage in ("truncated", "empty"):
            assert f"{second} is not a whole file of labels" in caplog.text
        elif damage == "edited byte":
            assert f"{second} does not match its checksum" in caplog.text

    @pytest.mark.parametrize(
        "change",
        [
            {"settings": {**SETTINGS, "saliency": {**SETTINGS["saliency"], "reduction": "abs"}}},
            {"settings": {**SETTINGS, "saliency": {**SETTINGS["saliency"], "target": "logit"}}},
            {"settings": {**SETTINGS, "saliency": {**SETTINGS["saliency"], "batch_tokens": 60}}},
            {"settings": {**SETTINGS, "pruning": {"start": 1, "step": 1}}},
            {"settings": {**SETTINGS, "model": {**SETTINGS["model"], "dtype": "bfloat16"}}},
            {"settings": {**SETTINGS, "model": {**SETTINGS["model"], "attention": "eager"}}},
            {"code": "e" * 64},
        ],
        ids=str,
    )
    def test_those_of_other_settings_or_code_are_not_taken(
        self, killed: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="sdtp"):
            assert self.again(killed, **change) == 0
        assert f"{checkpoints(killed, 0)} has chunks of other settings" in caplog.text

    def test_those_of_a_run_that_had_too_little_memory_are_taken_when_it_recomputes(self, killed: Path) -> None:
        chunks(killed, 0)[1].unlink()
        recomputing = {
            **SETTINGS["saliency"],
            "gradient_checkpointing": not SETTINGS["saliency"]["gradient_checkpointing"],
        }
        assert self.again(killed, settings={**SETTINGS, "saliency": recomputing}) == 40 - 17
        # The labels computed so are the others' to the bit, so the setting need not be the same throughout a shard.
        assert output(killed, 0).read_bytes() == (killed / "expected").read_bytes()

    def test_those_of_other_code_are_kept_until_the_shard_is_whole(
        self, killed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, true, calls = chunks(killed, 0), saliency.batch_saliency, []

        def interrupted(*args: Any) -> Any:
            calls.append(args)
            if len(calls) > 20:  # in the second chunk
                raise KeyboardInterrupt
            return true(*args)

        with monkeypatch.context() as patch:
            patch.setattr(saliency, "batch_saliency", interrupted)
            with pytest.raises(KeyboardInterrupt):
                shard(killed, 0, 1, code="e" * 64)
        assert len(chunks(killed, 0)) == 4
        assert set(own) < set(chunks(killed, 0))
        # Changed back, and whole: `again` sees to it that nothing is left.
        assert self.again(killed) == 40

    @pytest.mark.parametrize("changed", ["model", "data"])
    def test_those_of_another_model_or_other_data_are_not_taken(self, killed: Path, changed: str) -> None:
        manifest = killed / changed / "manifest.json"
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**content, "sha256": "n" * 64, "content_sha256": "n" * 64}))
        (killed / "expected").unlink()
        shard(killed, 0, 1)
        assert metrics(killed)["examples_resumed"] == 0

    def test_the_progress_bar_starts_where_the_killed_run_was(
        self, killed: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, *others = chunks(killed, 0)
        tokens = sum(label.shape[1] + 2 for label in map_labels(first)[1].values())
        for other in others:
            other.unlink()
        assert self.again(killed) == CHUNK_EXAMPLES
        shown = capsys.readouterr().err
        bars = [line for line in shown.replace("\n", "\r").split("\r") if line.startswith("saliency, shard 0")]
        total = sum(range(10, 50)) + 40 * 2
        assert f"{100 * tokens / total:.0f}%|" in bars[0]
        assert f"| {tokens}/{total / 1000:.2f}k [00:00<" in bars[0]  # the time that is left stands behind <
        assert "100%|" in bars[-1]
        assert "40/40 examples" in bars[-1]


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bytes_and_computes_nothing_twice(long_run: Path) -> None:
    """A real process, killed in each phase and started again. Its chunks have 16, 17 and 7 examples."""
    phases = {
        # phase: (how often it is reached before the kill, examples in whole chunks then, examples computed by then)
        "compute": (20, 16, 21),
        "write": (2, 16, 33),
        "rename": (2, 16, 33),
        "assembly": (1, 40, 40),
        "finish": (1, 40, 40),
    }
    plan: list[list[Any]] = []
    for name in ("undisturbed", *phases):
        run = long_run / name
        for inherited in ("model", "data"):
            shutil.copytree(long_run / inherited, run / inherited)
        arguments = ["saliency", *shard_arguments(run, 0, 1)]
        if name in phases:
            plan.append([name, phases[name][0], str(run / "killed.log"), str(run / "killed.txt"), arguments])
        plan.append(["", 0, str(run / "whole.log"), str(run / "whole.txt"), arguments])
    process = carry_out("tests.pipeline.killed_saliency", plan, long_run)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["0"] + ["-9", "0"] * len(phases), process.stderr

    def computed(path: Path) -> list[int]:
        return sorted(map(int, path.read_text().split())) if path.exists() else []

    every = sorted(range(10, 50))
    assert computed(long_run / "undisturbed" / "whole.txt") == every
    expected = output(long_run / "undisturbed", 0).read_bytes()
    for name, (_, saved, before) in phases.items():
        run = long_run / name
        assert output(run, 0).read_bytes() == expected, name
        log = (run / "whole.log").read_text()
        assert f"{saved} of 40 examples are taken from chunks of an interrupted run" in log, name
        assert metrics(run)["examples_resumed"] == saved
        # The first run's examples that were in no whole chunk, and those it had not come to.
        assert computed(run / "killed.txt") == sorted(RUN_ORDER[:before]), name
        assert computed(run / "whole.txt") == sorted(RUN_ORDER[saved:]), name
        assert not checkpoints(run, 0).exists(), name
        assert not list((run / "saliency").glob(".tmp-*")), name


class TestIndex:
    def test_lists_examples_in_the_order_of_the_data_and_reads_them_back(self, run: Path) -> None:
        shards = [shard(run, 0), shard(run, 1)]
        index = index_of(run, shards)
        content = json.loads(index.read_text())
        assert content["examples"] == [
            {"id": f"e{number}", "shard": f"shard-{number % 2}.safetensors", "tokens": 20 + number}
            for number in range(5)
        ]
        assert {key: content[key] for key in MADE_OF} == MADE_OF
        labels = Labels(index)
        assert torch.equal(labels["e3"], load_file(shards[1])["e3"])
        with pytest.raises(UserError, match="no example 'e9'"):
            labels["e9"]

    @pytest.mark.parametrize("fault", ["edited byte", "swapped"])
    def test_labels_of_shards_that_changed_since_are_not_read(self, run: Path, fault: str) -> None:
        shards = [shard(run, 0), shard(run, 1)]
        index = index_of(run, shards)
        first, second = (path.read_bytes() for path in shards)
        if fault == "swapped":
            shards[0].write_bytes(second)
            shards[1].write_bytes(first)
        else:
            shards[0].write_bytes(first[:-5] + bytes([first[-5] ^ 1]) + first[-4:])
        with pytest.raises(UserError, match=r"shard-0\.safetensors is not the shard .*index\.json was made of"):
            Labels(index)

    def test_refuses_shards_that_do_not_cover_the_data_once(self, run: Path) -> None:
        shards = [shard(run, 0), shard(run, 1)]
        _, labels = map_labels(shards[1])
        labels = {name: label.clone() for name, label in labels.items()}

        def refused(changed: dict[str, torch.Tensor], message: str) -> None:
            write_shard(shards[1], changed, MADE_OF, 1, 2)
            with pytest.raises(UserError, match=message):
                index_of(run, shards)
            assert not (run / "saliency" / "index.json").exists()

        refused({"e1": labels["e1"]}, "1 examples have no saliency, 'e3' for one")
        refused({**labels, "e9": torch.rand(2, 5)}, "1 examples are not in the data, 'e9' for one")
        refused({**labels, "e0": torch.rand(2, 20)}, r"shard-1\.safetensors: example 'e0' is in shard-0\.safetensors")
        refused({**labels, "e3": labels["e3"][:1].clone()}, r"'e3' has shape \(1, 23\), but \(2, 23\) is")
        refused({**labels, "e3": torch.rand(2, 24)}, r"'e3' has shape \(2, 24\), but \(2, 23\) is")
        write_shard(shards[1], labels, MADE_OF, 1, 2)
        index_of(run, shards)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("missing", r"shard-0\.safetensors: this is shard 0 of 2, but shard 0 of 1 is needed"),
            ("not there", r"shard-1\.safetensors is not a whole file of labels"),
            ("swapped", r"shard-0\.safetensors: this is shard 1 of 2, but shard 0 of 2 is needed"),
            ("twice", r"shard-1\.safetensors: this is shard 0 of 2, but shard 1 of 2 is needed"),
            ("edited byte", r"shard-1\.safetensors does not match its checksum"),
            ("edited description", r"shard-1\.safetensors does not match its checksum"),
            ("truncated", r"shard-1\.safetensors is not a whole file of labels"),
            ("cut in the header", r"shard-1\.safetensors is not a whole file of labels"),
            ("other settings", r"shard-1\.safetensors: reduction is abs, but signed in .*shard-0"),
            ("other stages", r"shard-1\.safetensors: layers is \[1\], but \[1, 3\] in .*shard-0"),
            ("a chunk", r"shard-1\.safetensors is not a saliency shard: its description has fingerprint only"),
        ],
    )
    def test_refuses_a_shard_that_is_not_the_one_needed(self, run: Path, fault: str, message: str) -> None:
        first, second = shards = [shard(run, 0), shard(run, 1)]
        content = second.read_bytes()
        match fault:
            case "missing":
                shards = [first]
            case "not there":
                second.unlink()
            case "swapped":
                second.write_bytes(first.read_bytes())
                first.write_bytes(content)
            case "twice":
                second.write_bytes(first.read_bytes())
            case "edited byte":
                second.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
            case "edited description":
                assert content.count(b"signed") == 1
                second.write_bytes(content.replace(b"signed", b"singed"))
            case "truncated":
                second.write_bytes(content[:-4])
            case "cut in the header":
                second.write_bytes(content[:100])
            case "other settings":
                shard(run, 1, settings={**SETTINGS, "saliency": {**SETTINGS["saliency"], "reduction": "abs"}})
            case "other stages":
                shard(run, 1, settings={**SETTINGS, "pruning": {"start": 1, "step": 3}})
            case "a chunk":
                write_labels(second, {"e1": torch.rand(2, 21)}, {"fingerprint": "f"})
        with pytest.raises(UserError, match=message):
            index_of(run, shards)
        assert not (run / "saliency" / "index.json").exists()

    def test_refuses_labels_of_other_data(self, run: Path) -> None:
        shards = [shard(run, 0, 1)]
        rows = Dataset.load_from_disk(str(run / "data" / "heldout")).to_list()
        shutil.rmtree(run / "data" / "heldout")
        rows[0]["prompt_ids"].append(5)
        Dataset.from_list(rows).save_to_disk(run / "data" / "heldout")
        with pytest.raises(UserError, match=r"'e4' has shape \(2, 24\), but \(2, 25\)"):
            index_of(run, shards)
        (run / "data" / "manifest.json").write_text(json.dumps({"content_sha256": "x" * 64}))
        with pytest.raises(UserError, match=r"data_sha256 of the shards is d+, but the data's is x+"):
            index_of(run, shards)
