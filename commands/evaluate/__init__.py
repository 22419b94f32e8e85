"""The command evaluate: error rates and thresholds on photos of the operator's own.

It runs the service's own pipeline on the photos. It imports what every command may import.
"""
