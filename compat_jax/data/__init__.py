"""Data: sources, the task sequence, augmentation."""
