"""Programs that users start on the ranks of a job."""

import megatron_star  # noqa: F401  first of all: it silences what Megatron-Core says at import
