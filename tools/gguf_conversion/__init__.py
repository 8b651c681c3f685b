"""Parts of tools/convert_gguf.py: a GGUF file's metadata, tensors and tokenizer in Hugging Face's form."""
