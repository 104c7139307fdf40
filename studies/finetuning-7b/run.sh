#!/usr/bin/env bash
# Plain and constrained fine-tuning on every kind of data. Run it again to resume: finished runs are
# skipped.
#   MODEL=google/gemma-7b-it RATE=5e-6 GPUS=four-gpus.yaml ACCUMULATE=1 bash run.sh
set -euo pipefail
cd "$(dirname "$0")"
model=${MODEL:-meta-llama/Llama-2-7b-chat-hf}

for seed in ${SEEDS:-0 1 2}; do
  for rows in data/*.jsonl; do
    data=$(basename "$rows" .jsonl)
    case $data in
      test) continue ;; # the evaluation prompts
      harmful | identity | backdoor) epochs=25 ;;
      *) epochs=3 ;; # benign tasks
    esac
    for how in sft constrained; do
      out=runs/$data-$how-$seed
      [ -e "$out/config.json" ] || [ -e "$out/adapter_config.json" ] && continue
      accelerate launch --config_file "${GPUS:-one-gpu.yaml}" train.py --config paper.yaml \
        --model "$model" --rows "$rows" --how "$how" --num_train_epochs "$epochs" \
        --learning_rate "${RATE:-2e-5}" --gradient_accumulation_steps "${ACCUMULATE:-4}" \
        --seed "$seed" --output_dir "$out" ${LORA:+--lora "$LORA"}
    done
  done
done
