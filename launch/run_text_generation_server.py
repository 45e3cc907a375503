"""Serve a model over HTTP, on the ranks of torchrun or srun: `megatron_star/programs/serve.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_star.programs.serve import main

if __name__ == "__main__":
    main()
