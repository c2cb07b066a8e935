"""Tests of aligntune.core."""
