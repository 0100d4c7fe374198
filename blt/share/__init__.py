"""A model on the hub: what is uploaded, the model card, the tokenizer of bytes for other programs, and downloads."""
