"""Adapters of PEFT: what their files hold, which tensors of a base they change, and these tensors as they are then."""
