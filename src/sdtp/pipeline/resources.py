"""What Snakemake measured of a job, as metrics of the step's run."""

import csv
from pathlib import Path

from sdtp.pipeline.operations import Operation, metrics

# Columns of a benchmark record that are numbers; h:m:s repeats the first.
COLUMNS = ("s", "max_rss", "max_vms", "max_uss", "max_pss", "io_in", "io_out", "mean_load", "cpu_time")


def resources_file(metrics_file: Path | None, output: Path, step: str) -> Path:
    """Where Snakemake puts the record of a step's job: `resources/NAME.tsv` for a step with `metrics/NAME.json`.

    metrics_file: the step's, None for a step without one, whose record lies beside its output, under the step's name.
    """
    if metrics_file is None:
        return output.resolve().parent / "resources" / f"{step}.tsv"
    return metrics_file.resolve().parents[1] / "resources" / f"{metrics_file.stem}.tsv"


def measured(record: Path, since: int) -> Operation | None:
    """The numbers of a record, named `snakemake/COLUMN`; None where there is none that was written after `since`.

    since: milliseconds since 1970; an older record is of an earlier job. Of several repeats the last one counts.
    """
    try:
        written = record.stat().st_mtime_ns // 1_000_000
        with open(record, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except OSError:
        return None
    if written < since or not rows:
        return None
    numbers = {column: _number(rows[-1].get(column)) for column in COLUMNS}
    return metrics((f"snakemake/{name}", value, written, 0) for name, value in numbers.items() if value is not None)


def _number(text: str | None) -> float | None:
    """Snakemake writes - or NA for what it could not measure of a short job."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
