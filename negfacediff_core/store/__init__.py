"""Artefacts on disk: fingerprinted stage directories, whole-shard units, completion records; no torch."""
