#!/usr/bin/env bash
# From nothing to a trained model: a synthetic log, an MMoE with three objectives on two Ray workers, its metrics beside
# the best possible ones. Run by `make quickstart`; needs the environment that deploy/install.sh makes.
set -euo pipefail
cd "$(dirname "$0")/../.."
mtrec=.venv/bin/mtrec
data=runs/quickstart-data
run=runs/quickstart

echo "== 1. A synthetic log with known truth: $data"
rm -rf "$data" "$run"
"$mtrec" synth "$data" --rows 500000 --seed 7

echo "== 2. Train on two Ray workers: pipelines/quickstart/experiment.yaml"
"$mtrec" train pipelines/quickstart/experiment.yaml --workers 2 --output "$run"

echo "== 3. The model beside the truth, on rows it has not seen"
.venv/bin/python pipelines/quickstart/against_truth.py "$run" "$data/validation"
