"""RULER-style tasks: predictions of a model under a pruner, and scores that are recomputable from them alone.

A score is the share of references that stand in the prediction, in percent; for tasks of `PART_MATCH`, whose references
are different ways to write one answer, 100 where any does (Hsieh et al. 2024, arXiv 2404.06654, section 4 and their
published code's two measures).
"""
