#!/bin/sh
# GSM8K end to end: SFT, a PRM by inverse RL, its scores, best of N by them, and accuracy before and after.
#
#     MODEL=SmolLM2-135M-Instruct DATA=gsm8k sh examples/gsm8k.sh [FOLDER]        FOLDER: runs/gsm8k-example
#
# MODEL is a folder or a hub id (GGUF: the file to load in that folder, if it is GGUF); DATA a folder with GSM8K's
# train.jsonl and test.jsonl, rows {"question", "answer"}. The sizes are small, for CPUs; raise them on a GPU.
# SYSTEM=prm-offline trains the PRM alone, on fixed responses of the SFT model; SYSTEM=repirl PRM and policy in turn.
set -eu
T=${1:-runs/gsm8k-example}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
DATA=${DATA:-gsm8k}
PRESET=${PRESET:-smollm2-gsm8k}
SYSTEM=${SYSTEM:-repirl}
# Solutions to learn from first, other problems for the PRM, held-out problems; updates of SFT, turns of the PRM.
SFT_SOLUTIONS=${SFT_SOLUTIONS:-512} PROBLEMS=${PROBLEMS:-256} HELD_OUT=${HELD_OUT:-50}
SFT_UPDATES=${SFT_UPDATES:-32} TURNS=${TURNS:-64}
# Responses to each problem, and the longest response in tokens.
SAMPLES=${SAMPLES:-4} TOKENS=${TOKENS:-200}
EVALUATED=${EVALUATED:-50}

mkdir -p "$T"
head -n "$SFT_SOLUTIONS" "$DATA/train.jsonl" > "$T/sft.jsonl"
tail -n "+$((SFT_SOLUTIONS + 1))" "$DATA/train.jsonl" | head -n "$PROBLEMS" > "$T/problems.jsonl"
tail -n "$HELD_OUT" "$DATA/train.jsonl" > "$T/held_out.jsonl"

echo "== SFT, so that the responses look like the experts'"
repirl train --preset "$PRESET" --objective sft --output_dir "$T/sft" --policy.model "$MODEL" \
    ${GGUF:+--policy.gguf_file "$GGUF"} \
    --data.train "$T/sft.jsonl" --policy.optimizer.lr 2e-5 --irl.experts_per_step 16 --steps "$SFT_UPDATES"
repirl export --checkpoint "$T/sft" --output "$T/sft-out"

if [ "$SYSTEM" = repirl ]; then
    echo "== PRM and policy in turn, from the SFT model"
    repirl train --preset "$PRESET" --output_dir "$T/run" --policy.model "$T/sft-out/policy" \
        --data.train "$T/problems.jsonl" --data.eval "$T/held_out.jsonl" --prm.updates_per_step 4 \
        --prm.optimizer.lr 5e-5 --prm.optimizer.head_lr 5e-4 --rollout.temperature 1.0 \
        --rollout.samples_per_prompt "$SAMPLES" --rollout.max_response_tokens "$TOKENS" --steps "$TURNS"
else
    echo "== A PRM alone, from human solutions and fixed responses of the SFT model"
    repirl sample --preset "$PRESET" --policy.model "$T/sft-out/policy" --data.train "$T/problems.jsonl" \
        --rollout.temperature 1.0 --rollout.samples_per_prompt "$SAMPLES" \
        --rollout.max_response_tokens "$TOKENS" --output "$T/rollouts.jsonl"
    repirl train --preset "$PRESET" --objective prm-offline --output_dir "$T/run" --policy.model "$T/sft-out/policy" \
        --data.train "$T/problems.jsonl" --data.trajectories "$T/rollouts.jsonl" \
        --irl.use_outcome false --prm.optimizer.lr 5e-5 --prm.optimizer.head_lr 5e-4 --rollout.temperature 1.0 \
        --rollout.samples_per_prompt "$SAMPLES" --rollout.prompts_per_step 4 --steps "$TURNS"
fi
repirl export --checkpoint "$T/run" --output "$T/out"
repirl report --run "$T/run"

echo "== Sample from the SFT model on held-out problems; score and choose among the responses"
repirl sample --preset "$PRESET" --policy.model "$T/sft-out/policy" --data.train "$T/held_out.jsonl" \
    --rollout.samples_per_prompt "$SAMPLES" --rollout.max_response_tokens "$TOKENS" --output "$T/samples.jsonl"
repirl score --prm "$T/out/prm" --input "$T/samples.jsonl" --output "$T/scored.jsonl" --token-rewards
repirl rerank --input "$T/scored.jsonl" --output "$T/rerank.json"

echo "== Accuracy on test problems"
for NAME in sft-out out; do
    if [ -d "$T/$NAME/policy" ]; then
        repirl eval --benchmark gsm8k --model "$T/$NAME/policy" --data "$DATA/test.jsonl" --problems "$EVALUATED" \
            --samples "$SAMPLES" --max-response-tokens "$TOKENS" --output "$T/eval-$NAME" \
            --prompt "{problem}
Solve it step by step. End with the answer alone on a line that starts with ####."
    fi
done
