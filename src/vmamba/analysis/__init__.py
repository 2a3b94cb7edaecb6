"""What a backbone costs and what it sees."""
