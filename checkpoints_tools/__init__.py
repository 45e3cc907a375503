"""Between Hugging Face, GGUF and Megatron checkpoints. Each module with a `main` is a command."""

from megatron_star.quiet import without_notes_of_dependencies

without_notes_of_dependencies()
