"""What happens to a prompt: schedules, scorers and the pruner. Needs torch and transformers only."""
