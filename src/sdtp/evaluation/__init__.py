"""What pruning gains and what it costs: latency, memory, generated text and quality."""
