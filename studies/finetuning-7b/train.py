"""Fine-tune a chat model, plainly or constrained, with everything else the same.

    accelerate launch --config_file one-gpu.yaml train.py --config paper.yaml \\
        --model meta-llama/Llama-2-7b-chat-hf --rows data/harmful.jsonl --how constrained \\
        --num_train_epochs 25 --output_dir runs/harmful-constrained

`--rows` is JSONL with `prompt` and `completion`, or `messages`. All other options are those of
TRL's SFTConfig, from the command line or a YAML file behind --config.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from leadline.align import ConstrainedSFTConfig, ConstrainedSFTTrainer

WAYS = {
    "sft": (SFTConfig, SFTTrainer),
    "constrained": (ConstrainedSFTConfig, ConstrainedSFTTrainer),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--how", choices=WAYS, required=True)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters, not all weights")
    ours, rest = parser.parse_known_args()
    config, trainer = WAYS[ours.how]
    (args,) = TrlParser(config).parse_args_and_config(rest)
    lora = ours.lora and LoraConfig(
        r=ours.lora, lora_alpha=2 * ours.lora, target_modules="all-linear"
    )
    rows = load_dataset("json", data_files=ours.rows, split="train")
    tokenizer = AutoTokenizer.from_pretrained(ours.model)
    made = trainer(
        ours.model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    made.train()
    made.save_model()


if __name__ == "__main__":
    main()
