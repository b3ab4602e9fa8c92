"""Looks at Python, torch, GPUs, memory, disks, the hub and the MLflow store, and says what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from sdtp.pipeline.doctor.examine import TIMEOUT, examine
from sdtp.pipeline.doctor.finding import Finding
from sdtp.pipeline.terminal import tell

WIDTH = 120


def main(argv: list[str]) -> None:
    """Run the step; `argv` are its arguments. Exits with 1 where something failed."""
    parser = argparse.ArgumentParser(
        prog="sdtp doctor",
        description=f"{__doc__} A failure stops the workflow or makes it useless, a warning takes something away from "
        "it. Nothing is changed. Exits with 1 where something failed.",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folder of the runs; results unless given"
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="S", help=f"seconds to wait for a server; {TIMEOUT:g}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if not args.timeout > 0:
        parser.error(f"--timeout {args.timeout:g}: seconds above 0 are needed")
    findings = list(examine(args.results, args.timeout))
    failed = any(finding.status == "failure" for finding in findings)
    if args.json:
        told = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
        tell(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        tell("\n".join(_text(findings)))
    if failed:
        raise SystemExit(1)


def _text(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding, and under it what to do."""
    width = max(len(finding.name) for finding in findings)
    indent = " " * (len("failure  ") + width + 2)
    lines = []
    for finding in findings:
        start = f"{finding.status:<7}  {finding.name:<{width}}  "
        lines += textwrap.wrap(finding.found, WIDTH, initial_indent=start, subsequent_indent=indent)
        if finding.advice:
            lines += textwrap.wrap(finding.advice, WIDTH, initial_indent=f"{indent}→ ", subsequent_indent=f"{indent}  ")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warning", "failure")}
    return [*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items())]
