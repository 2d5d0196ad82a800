"""Predictions as cells of whole counts: how much genes vary beyond chance, which rates give a predicted mean, and draws at them.

``dispersion``, ``rates`` and ``drawing`` take and give arrays and know no model; ``prediction`` asks models and keeps ``parts`` of
what it has drawn, so that a long run can be killed and go on.
"""
