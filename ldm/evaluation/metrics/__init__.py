"""Metrics, one file for each family; :func:`ldm.evaluation.metric.all_metrics` imports them by iteration."""
