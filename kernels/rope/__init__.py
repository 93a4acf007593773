"""Rotary embedding of queries and keys, in place."""

from .op import rope_ as rope_
