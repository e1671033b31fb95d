"""Meme-LLaVA: build, train, merge and ask vision-language models that read Chinese memes."""
