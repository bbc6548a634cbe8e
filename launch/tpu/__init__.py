"""Cloud TPU slices: the commands that rent one, the script of its hosts, the plan of its memory."""
