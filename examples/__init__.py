"""Programs that use flowpp as a stranger would."""
