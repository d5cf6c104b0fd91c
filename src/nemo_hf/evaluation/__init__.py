"""Measures modules: report, metrics, latency."""
