"""What every rank of a test imports, once for all of them."""

import torch

from megatron_star.quiet import without_notes_of_dependencies

without_notes_of_dependencies()  # before Megatron is imported

import ranks  # noqa: E402, F401

torch.set_num_threads(1)
