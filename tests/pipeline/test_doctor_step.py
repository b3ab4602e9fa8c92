"""`sdtp doctor`: its table, its JSON, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdtp.pipeline.doctor.finding import Finding
from sdtp.pipeline.steps import doctor

FINE = Finding("disk", "ok", "59 GiB free")
WARNING = Finding("hub", "warning", "not reached", "use a folder")
FAILURE = Finding("MLflow store", "failure", "word " * 40, "move it away and " * 8)


def findings(monkeypatch: pytest.MonkeyPatch, *found: Finding) -> None:
    monkeypatch.setattr(doctor, "examine", lambda results, timeout: iter(found))


def test_a_line_each_and_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings(monkeypatch, FINE, WARNING)
    doctor.main([])  # a warning is no failure
    assert capsys.readouterr().out.splitlines() == [
        "ok       disk  59 GiB free",
        "warning  hub   not reached",
        "               → use a folder",
        "",
        "1 ok, 1 warning, 0 failure",
    ]


def test_a_failure_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings(monkeypatch, FINE, FAILURE)
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    assert end.value.code == 1
    told = capsys.readouterr().out.splitlines()
    assert max(map(len, told)) <= doctor.WIDTH
    assert [line.split()[0] for line in told if not line.startswith(" ") and line] == ["ok", "failure", "1"]
    assert sum(line.lstrip().startswith("→") for line in told) == 1
    with pytest.raises(SystemExit) as end:
        doctor.main(["--json"])
    assert end.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["findings"][0] == {"name": "disk", "status": "ok", "found": "59 GiB free", "advice": ""}


def test_json_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    doctor.main(["--json", "--results", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    named = {finding["name"]: finding["found"] for finding in found["findings"]}
    assert named["MLflow store"].startswith(f"{tmp_path / 'mlflow.db'}, ")
    assert str(tmp_path) in named["results"]


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        doctor.main(["--timeout", "0"])
    assert end.value.code == 2
    assert "--timeout 0: seconds above 0 are needed" in capsys.readouterr().err
