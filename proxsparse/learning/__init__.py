"""The learning loop: TRL's SFTTrainer, and what ProxSparse adds to it."""
