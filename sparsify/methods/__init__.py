"""Methods: frozen records of functions, the published ones, and what they are made of."""
