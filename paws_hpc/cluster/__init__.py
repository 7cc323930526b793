"""Where stages run: here or as jobs on Slurm, and how those are submitted, stopped, resumed and looked at."""
