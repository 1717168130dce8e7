"""Proofs of a configuration: every backend trains the same model, and a killed run resumes exactly."""
