"""Real chat models: their files, templates, scoring, and a policy by one process or many."""
