"""Carries out plans; the only owner of threads and streams."""
