"""The tables and figures of the paper (arXiv 2504.04514) for a run's own model, beside the paper's numbers."""
