"""Context encoding and token generation on top of a Megatron model with Star Attention."""
