"""Who answers a question about an image: our model, transformers, an endpoint, OCR; the chat page."""
