"""Analysis of a backbone: its cost, its activation maps and its receptive field."""
