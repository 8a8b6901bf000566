"""The stories: what each command does, step by step."""
