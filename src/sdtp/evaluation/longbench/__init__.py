"""LongBench (Bai et al., arXiv 2308.14508): 21 tasks with long prompts, their metrics, and scores from predictions.

Tasks, answer lengths, metrics and rules are the benchmark's own. The wording of the prompts is not (see `templates`):
it asks for the same thing in the same order in other words, so that scores compare methods within a run. With the
official templates in the place of ours they can be held against published ones.

Scores, of examples, tasks, categories and means alike, go from 0 to 100.
"""
