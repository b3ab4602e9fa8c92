"""The names users rely on, and what importing them may cost."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from sdtp import PruningSchedule, TokenPruner, flops, protect_messages, scorers
from sdtp.training import pairwise_ranking

schedule = PruningSchedule.geometric(num_layers=28, start=4, step=3, ratio=0.9, sinks=4, local=0.1, min_local=16)
assert schedule.layers[0] == 4 and len(schedule.surviving(1000)) == 8
TokenPruner(schedule, scorers.Random(seed=0))
for name in ("Learned", "Random", "Recent", "HiddenNorm", "LastQuery", "Saliency"):
    getattr(scorers, name)
print(sorted({name.partition(".")[0] for name in sys.modules} & {
    "snakemake", "mlflow", "datasets", "pandas", "matplotlib", "accelerate", "scipy"}))
"""


def test_the_library_imports_neither_workflow_nor_tracking() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
