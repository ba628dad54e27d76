"""What a feature does to the model's next words, and a label from that evidence."""
