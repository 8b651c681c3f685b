"""vLLM's model classes with selectors in their full-attention layers."""
