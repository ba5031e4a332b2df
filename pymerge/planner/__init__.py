"""Everything known from headers: steps, offsets, costs, memory, problems. Pure."""
