"""The figures of a run, as rules, steps and report share them; imports nothing, since the Snakefile reads it."""

# File name, without suffix -> title, in the order they are drawn.
FIGURES = {
    "saliency": "Saliency over layers and tokens",
    "sparsity": "How few tokens carry the saliency",
    "foresight": "How well early layers foretell what late ones need",
    "latency": "Prefill time by prompt length",
    "speedup": "Measured prefill speedup and its two bounds",
    "quality": "Quality against measured prefill speedup",
    "training": "Learning curves",
}
