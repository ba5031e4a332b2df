"""Checkpoints of torch.distributed.checkpoint, as trainings write them, one or more files for each process."""
