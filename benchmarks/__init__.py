"""Programs that measure; each says how it is started."""

from megatron_star.quiet import without_notes_of_dependencies

without_notes_of_dependencies()
