#!/usr/bin/env bash
# Run by Snakemake in the repository's root, inside the conda environment it has just made. What `make llmlingua` does, and
# this project without its requirements: of it only `sdtp lease` is used there.
set -euo pipefail
torch=$(sed -n 's/^constraint-dependencies = \["\(torch==[^"]*\)"\]$/\1/p' pyproject.toml)
python -m pip install "$torch"
python -m pip install --no-deps --require-hashes -r envs/llmlingua.lock
python -m pip install --no-deps -e .
