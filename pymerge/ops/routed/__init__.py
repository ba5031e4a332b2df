"""What `routed_linear` is made of: its passes, and how task vectors are stored."""
