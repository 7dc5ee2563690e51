"""Masking: one mask and its rule, the rewrite that uses weights through masks, and the way back."""
