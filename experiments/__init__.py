"""The presets of train.py other than the main job, and what they share."""
