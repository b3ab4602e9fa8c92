#!/usr/bin/env bash
# Run by Snakemake in the repository's root, inside the conda environment it has just made. The same three steps as in
# the Makefile: torch with its requirements, everything else from the lock, then this project.
set -euo pipefail
torch=$(sed -n 's/^constraint-dependencies = \["\(torch==[^"]*\)"\]$/\1/p' pyproject.toml)
python -m pip install "$torch"
python -m pip install --no-deps --require-hashes -r envs/requirements.lock
python -m pip install --no-deps -e .
