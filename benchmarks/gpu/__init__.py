"""What one GPU is asked within minutes: `scripts/gpu_check.py`."""
