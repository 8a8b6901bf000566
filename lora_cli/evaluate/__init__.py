"""Loss and perplexity, choice accuracy, generation metrics. Never disturbs training."""
