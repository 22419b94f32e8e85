"""The version of this service. `/openapi.json`, `--version` and the changelog's newest release agree on it."""

VERSION = "0.2.0"
