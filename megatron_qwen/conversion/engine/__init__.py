"""Carries out any plan: pieces over threads within a memory budget, staged, hashed, resumable, renamed at the end."""
