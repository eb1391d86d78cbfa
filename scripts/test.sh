#!/usr/bin/env bash
# Set up .venv, then lint, format check, type check and all tests. Arguments go to pytest: scripts/test.sh -m 'not slow'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
echo "== ruff check";  ruff check .
echo "== ruff format"; ruff format --check .
echo "== mypy";        mypy
# tiny tensors: a process of one thread on each of two cores; the longest files first, see tests/conftest.py
echo "== pytest";      OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
