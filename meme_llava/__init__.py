"""Meme-LLaVA: build, train, merge and ask vision-language models that read Chinese memes."""

import warnings

# peft reads a property that transformers has renamed; a user can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
