"""What happens in a call."""
