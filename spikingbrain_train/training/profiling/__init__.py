"""What a training step's time goes to: ``spikingbrain-profile-step``."""
