#!/bin/sh
# What a trained PRM is for, from one training run on: each command of the README once, on the demo's arithmetic.
# Needs no download, and less than ten minutes on two CPU cores.
#
#     sh examples/tour.sh [FOLDER]        or `make tour`; FOLDER: runs/tour
set -eu
T=${1:-runs/tour}
HELD_OUT=$T/data/eval.jsonl

echo "== A small model with a bad habit, and problems to unlearn it on"
python -c "
import sys; from pathlib import Path; from repirl.apps.start import Start, make_start
make_start(Path(sys.argv[1]), 0, Start())" "$T"
# So few prompts that each is sampled twice.
head -n 640 "$T/data/train.jsonl" > "$T/few.jsonl"

echo "== Train a PRM and a policy in turn, look at the run, export both"
repirl train --preset demo --output_dir "$T/run" --policy.model "$T/start" --data.train "$T/few.jsonl" \
    --data.eval "$HELD_OUT" --data.step_separator "; "
repirl report --run "$T/run"
repirl signal --run "$T/run" --turns 20
repirl export --checkpoint "$T/run" --output "$T/out"

echo "== Sample 16 responses to each held-out prompt from the start model; judge, score and choose among them"
repirl sample --preset demo --policy.model "$T/start" --data.train "$HELD_OUT" --rollout.samples_per_prompt 16 \
    --rollout.temperature 0.8 --output "$T/samples.jsonl"
repirl judge --verifier math --input "$T/samples.jsonl" --output "$T/judged.jsonl"
repirl score --prm "$T/out/prm" --input "$T/judged.jsonl" --output "$T/scored.jsonl"
repirl rerank --input "$T/scored.jsonl" --output "$T/rerank.json"

echo "== Search step by step by the PRM, beside whole responses of as many tokens"
repirl search --model "$T/start" --prm "$T/out/prm" --input "$HELD_OUT" --output "$T/searched.jsonl" --max-tokens 56 \
    --baseline

echo "== Train the start model on the held-out prompts by the frozen PRM, without answers"
repirl adapt --policy "$T/start" --prm "$T/out/prm" --prompts "$HELD_OUT" --output "$T/adapted" --answer-column answer \
    --turns 20 --lr 1e-4 --max-tokens 56

echo "== Find the first wrong step; the threshold is from other solutions"
python -m repirl.evals.own processbench "$T/calibrate.jsonl" --seed 1
python -m repirl.evals.own processbench "$T/steps.jsonl" --seed 2
repirl localize --prm "$T/out/prm" --calibrate "$T/calibrate.jsonl" --input "$T/steps.jsonl"
repirl eval --benchmark processbench --prm "$T/out/prm" --calibrate "$T/calibrate.jsonl" --data "$T/steps.jsonl" \
    --output "$T/processbench"

echo "== Evaluate the trained policy in the format of GSM8K"
python -m repirl.evals.own gsm8k "$T/gsm8k.jsonl" --seed 3
repirl eval --benchmark gsm8k --model "$T/out/policy" --data "$T/gsm8k.jsonl" --prompt "{problem}" --samples 4 \
    --max-response-tokens 56 --output "$T/gsm8k"
echo "== Done: $T/run/report.html is the page of the run"
