"""What flows: tasks, prompts, records. Knows nothing of models; imports no torch."""
