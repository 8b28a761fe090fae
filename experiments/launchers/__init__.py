"""Where runs are started: here, on queued resources, with xpk, with Slurm."""
