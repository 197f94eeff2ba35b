"""What does several stages or exports in one go: prune, export, evaluate, doctor."""
