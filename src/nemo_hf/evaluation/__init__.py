"""Measures modules: report, metrics, latency, rejection."""
