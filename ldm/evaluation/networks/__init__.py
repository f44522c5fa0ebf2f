"""Feature networks, one file for each family; :func:`ldm.evaluation.features.open_network` imports them by iteration."""
