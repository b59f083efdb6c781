"""The ablation study of the mini world: jobs, their numbers, and what they say of the papers' claims.

``python -m workshop.study run`` fills a folder with results and ``report`` tells what they show. Reading order:
``design`` (variants and jobs), ``work``, ``summary``, ``claims``, ``report``.
"""
