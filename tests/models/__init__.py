"""Tests of plora.models."""
