"""Reads a LLaVA directory with the transformers that runs this, and notes what the model computes.

    python benchmarks/read_logits.py MODEL OUTPUT.safetensors

older_reader.py runs it under two versions of transformers, 4.56 or newer. It imports nothing of Meme-LLaVA, whose
libraries the older environment lacks.
"""

import json
import sys

import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

QUESTION = "图里画了什么？写了哪些字？“加班使我快乐”😂"
NEW_TOKENS = 16
LOADING_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def draw_image() -> Image.Image:
    """Neither square nor of one colour: resizing and normalising have something to do."""
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(angle) for angle in (0, 90, 180)]).resize((200, 150))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 110, 130), fill=(230, 90, 40), outline="black", width=3)
    draw.line((0, 149, 199, 0), fill="white", width=5)
    return image


@torch.inference_mode()
def main(model_folder: str, output: str) -> None:
    # Nothing in the directory may run code: neither its own, nor what a pickle could hold.
    model, report = LlavaForConditionalGeneration.from_pretrained(
        model_folder,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    processor = AutoProcessor.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=prompt, images=draw_image(), return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    # An answer that stops at once would compare little.
    output_ids = model.generate(**inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)
    tensors = {
        "pixel_values": inputs["pixel_values"],  # (1, 3, size, size)
        "input_ids": inputs["input_ids"],  # (1, length)
        "logits": model(**inputs).logits,  # (1, length, vocabulary)
        "answer_ids": output_ids[:, length:].contiguous(),  # (1, NEW_TOKENS)
    }
    facts = {
        "transformers": transformers.__version__,
        **{fault: sorted(map(str, report[fault])) for fault in LOADING_FAULTS},
        "vision_tower": type(model.model.vision_tower).__name__,
        "answer": processor.tokenizer.decode(tensors["answer_ids"][0]),
    }
    save_file(tensors, output, {"facts": json.dumps(facts)})


if __name__ == "__main__":
    main(*sys.argv[1:])
