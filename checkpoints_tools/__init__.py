"""Between Hugging Face, GGUF and Megatron checkpoints. Each module with a `main` is a command."""

import megatron_star  # noqa: F401  before Megatron: silences what it says at import
