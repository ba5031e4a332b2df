"""What a model's tensors are: roles, blocks, stacks, tied weights, token tables; by names, shapes and config.json."""
