"""Evaluation: streamed pseudobulks, native metrics, the table of scores. Arrays and tables in, tables out.

Knows no model and no data module.
"""
