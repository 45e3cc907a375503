"""What one GPU is asked within minutes, in one process: docs/gpu.md.

python scripts/gpu_check.py --output check.jsonl --budget 420
python scripts/gpu_check.py --report check.jsonl
python scripts/gpu_check.py --device cpu --model tiny --unit 64      # without a GPU: that it runs
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from benchmarks.gpu.check import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
