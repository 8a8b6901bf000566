"""What a run costs, before it is paid: memory, arithmetic, time."""
