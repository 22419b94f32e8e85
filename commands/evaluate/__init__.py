"""The command evaluate: error rates and thresholds on photos of your own."""
