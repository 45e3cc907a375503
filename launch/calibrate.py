"""Find the cheapest setting for your data, on the ranks of torchrun or srun.

The program is `megatron_star/programs/calibrate.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_star.programs.calibrate import main

if __name__ == "__main__":
    main()
