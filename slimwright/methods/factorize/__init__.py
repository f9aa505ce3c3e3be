"""Low-rank solvers: one file each."""
