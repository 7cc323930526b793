"""Where stages run: the chain on this machine now, and the seam behind which Slurm comes to stand."""
