"""How much accuracy a setting costs: tasks, scores with their uncertainty, calibration on own data."""
