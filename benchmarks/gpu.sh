#!/usr/bin/env bash
# All that only a GPU can tell, in at most 12 minutes on an H100 or H200, after `make setup`. Results go
# to gpu-results.md as they come, for benchmarks/RESULTS.md; benchmarks/gpu.py says what is measured.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && exec .venv/bin/python -m benchmarks.gpu "$@"
