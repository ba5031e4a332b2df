"""Words that all packages share: dtypes, shapes, names, units, devices, events, progress."""
