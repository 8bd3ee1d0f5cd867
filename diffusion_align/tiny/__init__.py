"""The embedded models: how they are built, how good they are, and their weights."""
