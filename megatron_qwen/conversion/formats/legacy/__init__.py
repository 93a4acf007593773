"""Per-rank `mp_rank_*` checkpoints (`--ckpt-format torch`) of any layout."""
