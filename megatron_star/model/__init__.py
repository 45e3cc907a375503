"""Star Attention inside Megatron-Core models, by specs and subclasses; nothing of Megatron is copied."""
