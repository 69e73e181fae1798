"""Tests of plora.training."""
