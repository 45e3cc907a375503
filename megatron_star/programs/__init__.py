"""The programs that users run; `launch/` has a script for each that torchrun or srun starts."""
