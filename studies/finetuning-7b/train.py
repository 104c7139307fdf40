"""Fine-tune a chat model, plainly or with the token-wise constraint, with the same settings.

    accelerate launch --config_file one-gpu.yaml train.py --config paper.yaml \\
        --model meta-llama/Llama-2-7b-chat-hf --rows data/harmful.jsonl --how constrained \\
        --num_train_epochs 25 --output_dir runs/harmful-constrained

`--rows` is a JSONL file with `prompt` and `completion`, or `messages`. All other options are those
of TRL's SFTConfig, on the command line or in the YAML file given as --config.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from leadline.align import ConstrainedSFTConfig, ConstrainedSFTTrainer

METHODS = {
    "sft": (SFTConfig, SFTTrainer),
    "constrained": (ConstrainedSFTConfig, ConstrainedSFTTrainer),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a model folder or hub id")
    parser.add_argument("--rows", required=True, help="a JSONL file of training data")
    parser.add_argument("--how", choices=METHODS, required=True, help="the training method")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters, not all weights")
    options, rest = parser.parse_known_args()
    config_class, trainer_class = METHODS[options.how]
    (config,) = TrlParser(config_class).parse_args_and_config(rest)
    lora = options.lora and LoraConfig(
        r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear"
    )
    trainer = trainer_class(
        options.model,
        config,
        train_dataset=load_dataset("json", data_files=options.rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
