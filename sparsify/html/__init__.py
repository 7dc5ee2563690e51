"""HTML: the report as one file that opens anywhere, with the layers, the rewritten graph and the history of a run."""
