"""Configurations: `--config=configs/FILE.py:arguments`."""
