"""What a trained process reward model is for, and the demo."""
