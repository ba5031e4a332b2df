"""Architecture of a model: roles of tensors, blocks, stacks, tied weights, token tables."""
