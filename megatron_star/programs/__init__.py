"""The programs that users run; `launch/` has a script for each that torchrun or srun starts."""

from megatron_star.quiet import without_notes_of_dependencies

without_notes_of_dependencies()
