"""The loop and what it needs: loss, optimizer, schedule, checkpoints."""
