"""Parts of `routed_linear` and `mix_weights`: passes over task vectors, and how these are stored."""
