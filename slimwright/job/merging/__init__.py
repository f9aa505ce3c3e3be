"""``merge``: several checkpoints combined into one."""
