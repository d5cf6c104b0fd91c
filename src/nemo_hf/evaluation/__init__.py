"""What a module is worth: report, metrics, latency, rejection."""
