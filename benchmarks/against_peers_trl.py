"""TRL's part in against_peers.py, by an own environment: python against_peers_trl.py FOLDER OUTPUT STEPS BATCH."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

PROJECTIONS = "q_proj k_proj v_proj o_proj out_proj fc1 fc2 gate_proj up_proj down_proj"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_row(record: dict) -> dict:
    question, answer = (turn["value"] for turn in record["conversations"])
    asked = [{"type": "image"}, {"type": "text", "text": question.removeprefix("<image>\n")}]
    return {
        "images": [Image.open(record["images"][0]).convert("RGB")],
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }


def main() -> None:
    folder, output, steps, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    records = json.loads((folder / "memes.json").read_text(encoding="utf-8"))
    processor = AutoProcessor.from_pretrained(folder / "base", trust_remote_code=False)
    processor.chat_template = TEMPLATE
    settings = SFTConfig(
        output_dir=output,
        max_length=None,
        per_device_train_batch_size=batch,
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        learning_rate=2e-5,
    )
    trainer = SFTTrainer(
        model=LlavaForConditionalGeneration.from_pretrained(folder / "base", trust_remote_code=False),
        processing_class=processor,
        train_dataset=Dataset.from_list([make_row(record) for record in records]),
        args=settings,
        peft_config=LoraConfig(
            r=32, lora_alpha=64, target_modules=PROJECTIONS.split(), modules_to_save=["multi_modal_projector"]
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
