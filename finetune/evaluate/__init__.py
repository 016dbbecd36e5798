"""Scoring a model, the baselines and a merged adapter on the test rows."""
