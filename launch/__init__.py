"""What starts processes: the command line, torchrun, later Slurm."""
