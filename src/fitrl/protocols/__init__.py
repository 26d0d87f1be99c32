"""What trainers can do, and what they return."""
