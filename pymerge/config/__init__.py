"""What the user said: YAML as typed models, with errors that name lines."""
