"""rlhf_lab: one entry point, one engine, every RLHF method."""
